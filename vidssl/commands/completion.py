"""Prints a script that completes commands, files, keys and values of `vidssl` in a shell.

bash:  eval "$(vidssl completion bash)"       in ~/.bashrc
zsh:   eval "$(vidssl completion zsh)"        in ~/.zshrc, after compinit
fish:  vidssl completion fish | source        in ~/.config/fish/config.fish
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from vidssl.commands.catalogue import CATALOGUES
from vidssl.commands.programs import PROGRAMS, Program
from vidssl.config import SHIPPED
from vidssl.config.key_tree import KeyNode, PartNode, SectionNode, find_topic, tree_of
from vidssl.core.errors import UserError, run_cli

OPTIONS = ("--help", "--print-config", "--dry-run", "--quiet")
# Each calls `vidssl complete WORDS`: the words behind vidssl, up to the one that is completed. Words that end
# with "=", "." or "/" go on. Where nothing is known, files are completed.
SCRIPTS = {
    "bash": r"""_vidssl() {
  local line=${COMP_LINE:0:COMP_POINT} word known
  local -a words
  read -ra words <<<"$line"
  [[ $line == *[[:space:]] ]] && words+=("")
  word=${words[${#words[@]}-1]}
  mapfile -t COMPREPLY < <(vidssl complete "${words[@]:1}" 2>/dev/null)
  if ((${#COMPREPLY[@]} == 0)); then
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -f -- "${word##*=}")
    return
  fi
  [[ ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
  # readline replaces what follows the last "="
  [[ $word == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
}
complete -F _vidssl vidssl
""",
    "zsh": r"""_vidssl() {
  local -a found
  found=(${(f)"$(vidssl complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
  if (( ! ${#found} )); then compset -P '*='; _files; return; fi
  compadd -S '' -- ${(M)found:#*[=./]}
  compadd -- ${found:#*[=./]}
}
compdef _vidssl vidssl
""",
    "fish": r"""function __vidssl_words
  set -l words (commandline -opc)
  set -l current (commandline -ct)
  vidssl complete $words[2..-1] "$current" 2>/dev/null
  and return
  # a path may follow the "=" of a key
  set -l key (string match -r '^.*=' -- "$current")
  for path in (__fish_complete_path (string replace -r '^.*=' '' -- "$current"))
    echo "$key$path"
  end
end
complete -c vidssl -f -a '(__vidssl_words)'
""",
}


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0] not in SCRIPTS:
        raise UserError(f"vidssl completion: give one shell of {', '.join(SCRIPTS)}")
    print(SCRIPTS[argv[0]], end="")


def complete(argv: list[str], commands: Sequence[str]) -> None:
    """Prints the completions of the last word; exit status 1 if there is none."""
    found = [word for word in command_words(argv or [""], commands) if word.startswith((argv or [""])[-1])]
    if not found:
        sys.exit(1)
    print("\n".join(dict.fromkeys(found)))


def command_words(words: Sequence[str], commands: Sequence[str]) -> Iterator[str]:
    """What may stand in place of the last word. words: those behind `vidssl`."""
    command, *rest = words
    if not rest:
        yield from (*commands, "--help", "--version")
    elif command in PROGRAMS:
        yield from program_words(PROGRAMS[command], rest)
    elif command == "list" and len(rest) == 1:
        yield from CATALOGUES
    elif command == "completion":
        yield from SCRIPTS


def program_words(program: Program, words: Sequence[str]) -> Iterator[str]:
    """Options, files, keys up to the next dot, and values of a key."""
    word = words[-1]
    cls = program.cls()
    if word.startswith("-"):
        yield from OPTIONS
        yield from ["--processes"] * program.shares_work
    elif "=" in word:
        yield from (f"{word.partition('=')[0]}={value}" for value in values_of(cls, word.partition("=")[0]))
    else:
        asks = "--help" in words
        yield from keys_below(cls, word.rpartition(".")[0], "" if asks else "=")
        if not asks:
            yield from shipped_files(program, word)


def shipped_files(program: Program, word: str) -> Iterator[str]:
    """Files of configs/ that are for a program, folder by folder."""
    for folder in program.folders:
        if not word.startswith(f"configs/{folder}/"):
            yield f"configs/{folder}/"
        else:
            yield from (f"configs/{folder}/{path.name}" for path in sorted((SHIPPED / folder).glob("*.yaml")))


def keys_below(cls: type, parent: str, end: str) -> Iterator[str]:
    """The children of a section or part; those that have children end with a dot. end: of the others."""
    try:
        nodes: Sequence[Any] = find_topic(cls, parent) if parent else [tree_of(cls)]
    except UserError:
        return
    for node in nodes:
        kinds = list(node.kinds.values()) if isinstance(node, PartNode) else []
        if kinds and end:
            yield f"{parent}.kind{end}"
        if kinds and not end:
            yield from (f"{parent}.{kind.kind}" for kind in kinds)
        for holder in kinds or [node]:
            for name, child in holder.children.items():
                path = f"{parent}.{name}".lstrip(".")
                yield f"{path}{end}" if isinstance(child, KeyNode) else f"{path}."
                if not end and isinstance(child, SectionNode | PartNode):
                    yield path


def values_of(cls: type, key: str) -> Iterator[str]:
    """The words that a key may have."""
    try:
        nodes = find_topic(cls, key)
    except UserError:
        return
    for node in nodes:
        if isinstance(node, PartNode) and key.endswith(".kind"):
            yield from node.kinds
        elif isinstance(node, KeyNode):
            yield from _words(node.declared.hint)


def _words(hint: Any) -> Iterator[str]:
    if get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif hint is bool:
        yield from ("true", "false")
    elif hint is type(None):
        yield "null"
    else:
        for inner in get_args(hint):
            yield from _words(inner)


if __name__ == "__main__":
    run_cli(main)
