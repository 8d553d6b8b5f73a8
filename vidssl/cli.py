"""The command `vidssl`: one name for all programs.

`vidssl train ...` is `python vidssl/train.py ...`, `vidssl pack ...` is `python -m data_prep.pack ...`: the
same modules, arguments and exit statuses. Programs that have no other name are in vidssl/commands.
"""

import difflib
import runpy
import sys

from vidssl.core.errors import QUIET, UserError, run_cli

# Command -> (module, what it does)
COMMANDS = {
    "quickstart": ("vidssl.commands.quickstart", "videos to encoders, a table and a report, in minutes"),
    "synthetic": ("data_prep.synthetic", "render a small labelled corpus"),
    "pack": ("data_prep.pack", "videos and images to shards"),
    "scan": ("data_prep.scan", "an index for WebDataset shards of others"),
    "verify": ("data_prep.verify", "check shards against their index"),
    "leaks": ("data_prep.leaks", "find test videos in training shards"),
    "report": ("vidssl.commands.report", "runs, a zoo or shards as pictures and tables on one page"),
    "plan": ("vidssl.commands.plan", "what a run will need: memory, FLOPs, time, data, energy"),
    "train": ("vidssl.train", "pre-train an encoder"),
    "probe": ("vidssl.probe", "frozen evaluation: attentive, linear, k-NN, retrieval"),
    "finetune": ("vidssl.finetune", "train an encoder with a classifier"),
    "dense": ("vidssl.dense", "frozen evaluation: depth, keypoints, propagation"),
    "embed": ("vidssl.commands.embed", "features of videos: npy, Parquet, Zarr"),
    "search": ("vidssl.commands.search", "find nearest clips among embedded videos"),
    "compare": ("vidssl.commands.compare", "probes side by side, with paired intervals"),
    "zoo-run": ("vidssl.commands.zoo_run", "train and probe a list of methods on equal terms"),
    "adapt": ("vidssl.commands.adapt", "a checkpoint to your own videos, before and after compared"),
    "convert": ("vidssl.commands.convert", "checkpoints from one format to another"),
    "list": ("vidssl.commands.list", "methods, models, masks, targets, data, probes, ... by name"),
    "completion": ("vidssl.commands.completion", "a script that completes words in bash, zsh or fish"),
    "decode": ("vidssl.commands.decode", "what a run predicts behind its masks, as pixels"),
    "show": ("vidssl.commands.show", "pictures of masks, clips, data sets, features, attention"),
    "doctor": ("vidssl.doctor", "what this machine has, and what is missing"),
}


# What --help shows together; commands that are not here stand under "other".
GROUPS = {
    "to begin with": ("quickstart",),
    "data": ("synthetic", "pack", "scan", "verify", "leaks"),
    "training": ("plan", "train", "finetune", "zoo-run"),
    "evaluation": ("probe", "dense", "compare", "report"),
    "encoders": ("convert",),
    "pictures": ("show", "decode"),
    "about": ("list", "doctor", "completion"),
}


def usage() -> str:
    grouped = [name for names in GROUPS.values() for name in names]
    other = tuple(name for name in COMMANDS if name not in grouped)
    lines = ["vidssl COMMAND ...      vidssl COMMAND --help shows its arguments"]
    for group, names in {**GROUPS, "other": other}.items():
        lines += ["", f"{group}:"] * bool(names)
        lines += [f"  {name:12s} {COMMANDS[name][1]}" for name in names]
    lines += [
        "",
        "--quiet, of every command: warnings, errors and the last line alone. --version: which one this is.",
    ]
    lines += ["On N GPUs: vidssl train ... --processes N (also probe, finetune, embed)."]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs a command as its module would run as a script. Raises UserError for an unknown one."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    command, *rest = argv
    if command in ("-V", "--version"):
        import vidssl

        print(f"vidssl {vidssl.__version__}")
        return
    if command == "complete":  # asked by the scripts of `vidssl completion`
        from vidssl.commands.completion import complete

        complete(rest, list(COMMANDS))
        return
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise UserError(f"no command '{command}'; {hint}")
    # run_cli has taken --quiet from argv, and the program's own looks for it again
    sys.argv = [command, *rest, *[QUIET] * (QUIET in sys.argv)]
    runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)


def console() -> None:
    """The console script."""
    run_cli(main)


if __name__ == "__main__":
    console()
