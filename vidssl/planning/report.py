"""The plan of a run as lines of text."""

from collections.abc import Iterator

from vidssl.planning.run_plan import HOUR_S, RunPlan

LABEL = 28  # columns of the names


def report_lines(plan: RunPlan) -> Iterator[str]:
    """All figures, then all that was assumed."""
    for title, lines in (
        ("model", _model_lines(plan)),
        (_memory_title(plan), _memory_lines(plan)),
        ("time", _time_lines(plan)),
        ("data", _data_lines(plan)),
        ("failures", _failure_lines(plan)),
        ("assumed", _assumption_lines(plan)),
    ):
        yield title
        for name, value in lines:
            yield f"  {name:{LABEL}}{value}"
        yield ""


def _model_lines(plan: RunPlan) -> Iterator[tuple[str, str]]:
    count = plan.parameters
    yield "encoder", f"{count.encoder / 1e6:.2f} M parameters"
    yield "predictor and others", f"{count.others / 1e6:.2f} M"
    yield "momentum encoder, teachers", f"{count.frozen / 1e6:.2f} M"
    yield "model FLOPs", f"{plan.flops_clip / 1e9:.3g} GFLOP a clip, {plan.flops_run:.3g} FLOP the run"


def _memory_title(plan: RunPlan) -> str:
    config = plan.config
    clips = config["batch"] // config["devices"] if config["device_bytes"] else config["batch"]
    parts = f" in {config['micro_batches']} micro-batches" if config["micro_batches"] > 1 else ""
    again = ", activations recomputed" if config["activation_checkpointing"] else ""
    shared = f", {config['sharding']}" if config["sharding"] != "none" else ""
    return f"memory of a device ({config['precision']}, {clips} clips{parts}{again}{shared})"


def _memory_lines(plan: RunPlan) -> Iterator[tuple[str, str]]:
    memory = plan.memory
    rows = (
        ("weights", memory.weights, ""),
        ("momentum encoder, teachers", memory.frozen, ""),
        ("AdamW's moments", memory.moments, ""),
        ("gradients, held", memory.gradients, ""),
        ("activations", memory.activations, f" ({size_text(plan.kept_clip)} a clip)"),
        ("gradients, passing values", memory.passing, ""),
        ("clips", memory.clips, ""),
    )
    for name, size, note in rows:
        if size:
            yield name, f"{size_text(size):>9}{note}"
    limit = plan.config["device_bytes"]
    verdict = "" if limit is None else f" of {size_text(limit)}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    yield "in all", f"{size_text(memory.total):>9}{verdict}"
    if plan.advice:
        yield "it would fit with", plan.advice


def _time_lines(plan: RunPlan) -> Iterator[tuple[str, str]]:
    config = plan.config
    unit = "core" if config["device_bytes"] is None else config["device"]
    yield (
        "devices",
        f"{config['devices']} x {unit}" + (f" on {config['hosts']} hosts" if config["hosts"] > 1 else ""),
    )
    yield "a step", f"{duration(plan.step_s)}, {plan.clips_s:.3g} clips/s"
    yield (
        f"{config['steps']} steps",
        f"{duration(plan.run_s)}, with failures {duration(plan.run_s / plan.goodput)}",
    )
    yield "device hours", f"{plan.run_s / HOUR_S * config['devices']:.3g}"
    yield "energy", f"{plan.joules / 3.6e6:.3g} kWh"


def _data_lines(plan: RunPlan) -> Iterator[tuple[str, str]]:
    config = plan.config
    clips = config["steps"] * config["batch"]
    yield "clips", f"{clips:,}, {plan.clips_s:.3g} a second"
    if config["cache"] != "none":
        yield "cores for decoding", f"none after the start (data.cache={config['cache']})"
    else:
        each = f", {plan.cores / config['hosts']:.3g} a host" if config["hosts"] > 1 else ""
        yield "cores for decoding", f"{plan.cores:.3g}{each}"
    if plan.corpus is None:
        yield "corpus", "unknown: give data.train, or --videos and --video-mb"
    else:
        corpus = plan.corpus
        size = f", {size_text(corpus.size_bytes)}" if corpus.size_bytes else ""
        yield "corpus", f"{corpus.videos} videos{size}, seen {clips / corpus.videos:.3g} times each"
    yield (
        "checkpoints",
        f"{size_text(plan.checkpoint_bytes)} each, {size_text(plan.stored_bytes)} in the run folder",
    )


def _failure_lines(plan: RunPlan) -> Iterator[tuple[str, str]]:
    every = plan.config["save_every"]
    yield "time between failures", duration(plan.mtbf_s)
    yield "goodput", f"{plan.goodput:.2%} with run.save_every={every}"
    yield "best run.save_every", f"{plan.best_save_every} ({plan.goodput_best:.2%})"
    yield "a checkpoint stops work for", duration(plan.save_s)


def _assumption_lines(plan: RunPlan) -> Iterator[tuple[str, str]]:
    assumed = plan.assumptions
    is_cpu = plan.config["device_bytes"] is None
    peak = "126 GFLOP/s a core, f32 (docs/benchmarks.md)" if is_cpu else "the data sheet's dense peak"
    yield "model FLOPs utilization", f"{assumed.mfu:g} of {peak} (--mfu)"
    yield "CPU time of a clip", f"{assumed.cpu_ms:g} ms (--cpu-ms, --measure)"
    yield "power", f"{assumed.overhead:g} x that of the devices: hosts, network, cooling (--overhead)"
    yield "between failures", f"{assumed.mtbf_hours:g} h of one device, Poisson (--mtbf)"
    yield "restart", f"{assumed.restart_s:g} s until the next step (--restart-s)"
    yield "saving", f"{assumed.save_bytes_s / 1e9:g} GB/s to the host, written while the run goes on"
    if not is_cpu:
        free = f"{assumed.reserve_bytes / 1e9:g} GB and {assumed.reserve_share:.0%} of the memory stay free"
        yield "fits", f"{free}: context, libraries, gaps"
    yield "memory", "tensors without values, not compiled; kernels' own memory does not count"


def size_text(size: float) -> str:
    """Bytes, as GB or MB (10**9, 10**6)."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    """In the unit that people would use."""
    for limit, unit, size in (
        (2.0, "ms", 1e-3),
        (120.0, "s", 1.0),
        (7200.0, "min", 60.0),
        (172800.0, "h", HOUR_S),
    ):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
