"""Lists the commands, and runs them: `dinalrm COMMAND ...`, or `python -m dinalrm_jax COMMAND ...`."""

import ast
import difflib
import pathlib
import runpy
import sys

COMMANDS = (
    "train", "align", "evaluate", "preprocess", "convert", "score", "generate", "judge", "serve", "benchmark", "client",
)  # fmt: skip


def sentence(command: str) -> str:
    """The first line of a command's docstring; nothing is imported for it."""
    tree = ast.parse(pathlib.Path(__file__).with_name(f"{command}.py").read_text())
    return ast.get_docstring(tree).splitlines()[0]


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"dinalrm_jax.{name}", run_name="__main__", alter_sys=True)
    elif name in ("--help", "-h", "help"):
        print("usage: dinalrm COMMAND [flags], or python -m dinalrm_jax COMMAND [flags]; COMMAND --help says more.\n")
        for command in COMMANDS:
            print(f"  {command:<12}{sentence(command)}")
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
