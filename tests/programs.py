"""The programs of vidssl with one import of torch: in this process, or forked from one that has imported it.

python tests/programs.py WORLD MODULE ARGUMENTS ...     runs MODULE.main in WORLD processes of one training
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_here(main: Callable[[list[str]], None], *arguments: str) -> int:
    """Exit status of a program that runs in this process, at the root of the project."""
    from vidssl.core.errors import run_cli

    argv = sys.argv
    folder = Path.cwd()
    sys.argv = ["program", *map(str, arguments)]
    os.chdir(ROOT)
    try:
        run_cli(main)
    except SystemExit as e:
        return int(e.code or 0)
    finally:
        sys.argv = argv
        os.chdir(folder)
    return 0


def run_world(world: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in `world` processes that train together, as a launcher starts them."""
    call = [sys.executable, __file__, str(world), module, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def main(world: int, module: str, *arguments: str) -> None:
    from forked_world import fork_world, set_rank

    from vidssl.core.errors import run_cli

    program = importlib.import_module(module)
    sys.argv = [module, *arguments]

    def work(rank: int, port: int) -> None:
        set_rank(world, rank, port)
        run_cli(program.main)

    fork_world(world, work)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
