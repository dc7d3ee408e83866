"""The command `dmc-hub`, and the parser that it shares with the scripts.

A command is a function whose parameters are annotated with dataclasses; each field becomes an option, and its
`help` metadata the help text. Nothing heavy is imported until a command is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import os
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, cast

import dmc_hub
from dmc_hub.errors import EXIT_CODES, DmcHubError

if TYPE_CHECKING:
    from transformers import HfArgumentParser

PROGRAM = "dmc-hub"
DESCRIPTION = """\
Align diffusion planners and diffusion policies with a reward: train a foundation controller on logged data,
let it earn more of the reward by RL, DPO and SFT without leaving the data, and share the result as a LoRA
adapter."""
EPILOG = """\
`dmc-hub COMMAND --help` lists the options of a command. Options may also come from a file: `--config FILE`
reads defaults from YAML (`learning_rate: 1e-4`); what the command line says goes before what the file says.
An error is one line on stderr; `--debug` or DMC_HUB_TRACEBACK=1 shows the traceback too. Exit codes:
""" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())


@dataclass(frozen=True)
class Command:
    """A command: where its function is (`"module:function"`), what it does, and how it is called."""

    target: str
    summary: str
    example: str

    def function(self) -> Callable[..., None]:
        """Import the command's function."""
        module, _, name = self.target.partition(":")
        return cast(Callable[..., None], getattr(importlib.import_module(module), name))

    def parameter_types(self) -> list[type]:
        """The dataclasses that the function takes, in order."""
        hints = typing.get_type_hints(self.function())
        return [hint for name, hint in hints.items() if name != "return"]


COMMAND_GROUPS: dict[str, dict[str, Command]] = {
    "Everything in one go": {
        "align": Command(
            "dmc_hub.commands:align",
            "data, foundation, critic, then RL -> DPO -> SFT as one adapter; report",
            "dmc-hub align --task nav1d-full --output-dir runs/nav1d-full",
        ),
    },
    "Foundation": {
        "train-denoising": Command(
            "dmc_hub.commands:train_denoising",
            "train a diffusion planner or policy on a task's data",
            "dmc-hub train-denoising --task nav1d-full --output-dir runs/foundation",
        ),
        "train-critic": Command(
            "dmc_hub.commands:train_critic",
            "train twin Q and V functions by implicit Q-learning (IQL)",
            "dmc-hub train-critic --task nav1d-full --pipeline runs/foundation/pipeline --output-dir runs/critic",
        ),
    },
    "Alignment, one method at a time": {
        "train-ddpo": Command(
            "dmc_hub.commands:train_ddpo",
            "policy gradient over the denoising steps (REINFORCE or PPO clip)",
            "dmc-hub train-ddpo --task nav1d-full --pipeline runs/nav1d-full/pipeline --output-dir runs/ddpo",
        ),
        "train-reward-gradient": Command(
            "dmc_hub.commands:train_reward_gradient",
            "backpropagate the critic through the last denoising steps",
            "dmc-hub train-reward-gradient --task nav1d-full --pipeline runs/nav1d-full/pipeline --output-dir runs/rg",
        ),
        "train-nft": Command(
            "dmc_hub.commands:train_nft",
            "policy optimisation on noised samples: DiffusionNFT, advantage-weighted matching",
            "dmc-hub train-nft --task nav1d-full --pipeline runs/nav1d-full/pipeline --output-dir runs/nft",
        ),
        "train-dpo": Command(
            "dmc_hub.commands:train_dpo",
            "direct preference optimisation on ranked pairs",
            "dmc-hub train-dpo --task nav1d-full --pipeline runs/nav1d-full/pipeline --output-dir runs/dpo",
        ),
        "train-sft": Command(
            "dmc_hub.commands:train_sft",
            "fine-tune on the best of the controller's own samples",
            "dmc-hub train-sft --task nav1d-full --pipeline runs/nav1d-full/pipeline --output-dir runs/sft",
        ),
    },
    "Cascade": {
        "train-cascade": Command(
            "dmc_hub.commands:train_cascade",
            "train an up-sampler on pairs of the controller's samples",
            "dmc-hub train-cascade --task nav1d-full --pipeline runs/nav1d-full/pipeline --output-dir runs/cascade",
        ),
    },
    "Text to image": {
        "images train-nft": Command(
            "dmc_hub.image_commands:train_nft",
            "NFT on a Stable Diffusion, SDXL or SD3 pipeline, for rewards of your own",
            "dmc-hub images train-nft --model base --prompts all.txt --rewards mine.py:bright --output-dir runs/nft",
        ),
        "images train-ddpo": Command(
            "dmc_hub.image_commands:train_ddpo",
            "policy gradients over the denoising steps of such a pipeline",
            "dmc-hub images train-ddpo --model base --prompts all.txt --rewards mine.py:bright --output-dir runs/dd",
        ),
    },
    "Data": {
        "data info": Command(
            "dmc_hub.data_commands:data_info",
            "what a file, folder or repo of data holds: format, widths, steps, arrays",
            "dmc-hub data info --source hopper-medium-v2.hdf5",
        ),
        "data convert": Command(
            "dmc_hub.data_commands:data_convert",
            "D4RL, robomimic, zarr, relay-kitchen, Minari or LeRobot data as memory-mapped Arrow",
            "dmc-hub data convert --source pusht.zarr.zip --reward zero --output-dir data/pusht",
        ),
        "data collect": Command(
            "dmc_hub.commands:collect_data",
            "make a task's data: random, scripted or trained behaviour, in D4RL's qualities",
            "dmc-hub data collect --task metaworld-button-press --output-dir data/button-press --num-episodes 200",
        ),
        "data validate": Command(
            "dmc_hub.data_commands:data_validate",
            "everything that is wrong with data, by kind, episode and step; exit code 2 if anything is",
            "dmc-hub data validate --source data/pusht --task push-t",
        ),
        "data stats": Command(
            "dmc_hub.data_commands:data_stats",
            "episodes, lengths, returns, and the moments of every column, as JSON",
            "dmc-hub data stats --source data/pusht",
        ),
        "data view": Command(
            "dmc_hub.data_commands:data_view",
            "draw returns, lengths, trajectories and frames as a PNG",
            "dmc-hub data view --source data/pusht --output pusht.png",
        ),
        "data push": Command(
            "dmc_hub.data_commands:data_push",
            "push data to the Hub as Parquet, with a card",
            "dmc-hub data push --source data/walks --repo-id user/walks --title Walks --description W. --license mit",
        ),
        "data export": Command(
            "dmc_hub.data_commands:data_export",
            "write a task's data for datasets, LeRobot or Minari",
            "dmc-hub data export --task nav1d-full --format lerobot --output-dir runs/nav1d-full-lerobot",
        ),
    },
    "Share": {
        "push": Command(
            "dmc_hub.commands:push",
            "push a run, a pipeline or an adapter to the Hub, with its card",
            "dmc-hub push --folder runs/nav1d-full --repo-id user/nav1d-planner",
        ),
        "pull": Command(
            "dmc_hub.commands:pull_repo",
            "copy a pipeline or an adapter from the Hub, every file verified",
            "dmc-hub pull --repo-id user/nav1d-planner --output-dir runs/nav1d-planner",
        ),
        "card": Command(
            "dmc_hub.commands:card",
            "write the model card that a run's report gives",
            "dmc-hub card --run runs/nav1d-full --kind pipeline",
        ),
        "info": Command(
            "dmc_hub.commands:info",
            "what a repo or folder is, its task, base and results, and whether it is safe to load",
            "dmc-hub info --source user/nav1d-planner-lora",
        ),
    },
    "Measure": {
        "evaluate": Command(
            "dmc_hub.commands:evaluate",
            "roll a controller out: return, share of the optimum, coherency, diversity",
            "dmc-hub evaluate --task nav1d-full --pipeline runs/nav1d-full/pipeline --adapter runs/nav1d-full/adapter",
        ),
        "reproduce-nav1d": Command(
            "dmc_hub.commands:reproduce_nav1d",
            "the Nav1D rows of the paper's tables, cell by cell",
            "dmc-hub reproduce-nav1d --output-dir runs/nav1d-table --quick",
        ),
        "summarize": Command(
            "dmc_hub.commands:summarize",
            "runs of one task, one per training seed, as one table, card and plot",
            "dmc-hub summarize --runs runs/hopper-0 runs/hopper-1 --output-dir runs/hopper",
        ),
        "aggregate": Command(
            "dmc_hub.commands:aggregate",
            "summaries of several tasks as one: mean, median, IQM, optimality gap, with intervals",
            "dmc-hub aggregate --results runs/hopper/hopper-medium-planner.json --output-dir runs/aggregate",
        ),
        "ablate-alignment": Command(
            "dmc_hub.commands:ablate_alignment",
            "each alignment method alone, in pairs, in sequence, jointly, with a cascade",
            "dmc-hub ablate-alignment --output-dir runs/ablation --quick",
        ),
        "demo": Command(
            "dmc_hub.commands:demo",
            "a page on which controllers act, before and after alignment; or a Space with it",
            "dmc-hub demo --pipelines runs/nav1d-full/pipeline --adapters runs/nav1d-full/adapter",
        ),
        "task check": Command(
            "dmc_hub.commands:check_task",
            "a task from environment to evaluation in small: does everything work?",
            "dmc-hub task check --task hopper-medium",
        ),
        "doctor": Command(
            "dmc_hub.commands:doctor",
            "versions, extras, devices, caches, the folder of a run: is everything in order?",
            "dmc-hub doctor --output-dir runs/nav1d-full",
        ),
        "tasks": Command(
            "dmc_hub.cli:list_tasks",
            "list the known tasks",
            "dmc-hub tasks",
        ),
    },
}
COMMANDS = {name: command for group in COMMAND_GROUPS.values() for name, command in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dmc-hub` with the arguments `argv` (those of the process by default) and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    start = next((i for i, argument in enumerate(argv) if not argument.startswith("-")), len(argv))
    options = _main_parser().parse_args(argv[:start])
    if start == len(argv):
        _main_parser().print_help()
        return 0
    name = _command_name(argv[start:])
    try:
        run_command(name, argv[start + len(name.split()) :])
    except KeyboardInterrupt as error:
        print(f"{PROGRAM}: {_one_line(error) or 'interrupted'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    except Exception as error:
        if options.debug or os.environ.get("DMC_HUB_TRACEBACK", "") not in ("", "0"):
            raise
        print(f"{PROGRAM}: error: {_explained(error)}", file=sys.stderr)
        return _exit_code(error)
    return 0


def _exit_code(error: Exception) -> int:
    if isinstance(error, DmcHubError):
        return error.exit_code
    return 2 if isinstance(error, (ValueError, OSError, ImportError)) else 1


def _explained(error: Exception) -> str:
    """One line: the message where it was written for the user, else what happened and how to see where."""
    if isinstance(error, (DmcHubError, ValueError, OSError, ImportError, FloatingPointError)):
        return _one_line(error) or type(error).__name__
    return (
        f"{type(error).__name__}: {_one_line(error)} This is a failure inside the program; DMC_HUB_TRACEBACK=1 shows "
        "where."
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _command_name(words: Sequence[str]) -> str:
    """The command that the words start with: its name is one word or two."""
    is_group = any(name.startswith(f"{words[0]} ") for name in COMMANDS)
    return " ".join(words[:2]) if is_group and not "".join(words[1:2]).startswith("-") else words[0]


def run_command(name: str, argv: Sequence[str]) -> None:
    """Parse `argv` into the dataclasses that the command's function asks for, and call the function."""
    group = sorted(other.removeprefix(f"{name} ") for other in COMMANDS if other.startswith(f"{name} "))
    if group:
        raise ValueError(f"`{name}` goes on with {', '.join(group)}; `{PROGRAM} --help` lists them all")
    if name not in COMMANDS:
        guess = _did_you_mean(name, COMMANDS)
        raise ValueError(f"`{name}` is not a command{guess}; `{PROGRAM} --help` lists them all")
    command = COMMANDS[name]
    description = f"{command.summary[0].upper()}{command.summary[1:]}. Example: {command.example}"
    instances = parse_arguments(
        *command.parameter_types(), argv=argv, description=description, program=f"{PROGRAM} {name}"
    )
    command.function()(*instances)


def list_tasks() -> None:
    """Print the known tasks, one to a line."""
    from dmc_hub.tasks import TASKS

    for task in TASKS.values():
        print(f"{task.name:26} {task.summary}")


def parse_arguments(
    *dataclass_types: type,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    program: str | None = None,
) -> tuple[Any, ...]:
    """Make one instance of each dataclass from command-line options and the YAML file of `--config FILE`.

    Every field is an option, spelled with dashes or underscores; its help is the field's `help` metadata.
    What the command line says goes before what the file says, which goes before the fields' defaults.

    Args:
        dataclass_types: Dataclasses without a field in common. A field is a `bool`, number, `str`, `Path`,
            `Enum` or `Literal`, or an `Optional` or `list` of one; a `dict` can only come from the file.
        argv: The arguments, those of the process by default.
        description: What `--help` says before the options.
        program: The name that `--help` shows.

    Returns:
        The instances, in the order of `dataclass_types`.

    Raises:
        ValueError: An unknown option or key, or a value of a wrong type; the message names a file's line.
        FileNotFoundError: The file does not exist.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _options_parser(dataclass_types, description=description, program=program)
    hints = {name: hint for cls in dataclass_types for name, hint in typing.get_type_hints(cls).items()}
    config_path = _config_path(argv)
    if config_path is not None:
        _set_defaults_from_file(parser, config_path, hints)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(_unknown_option_message(parser, unknown[0]))
    return tuple(_instance(cls, namespace, hints) for cls in dataclass_types)


def _main_parser() -> argparse.ArgumentParser:
    lines = []
    for group, commands in COMMAND_GROUPS.items():
        lines.append(f"{group}:")
        for name, command in commands.items():
            lines += [f"  {name:<22} {command.summary}", f"      $ {command.example}"]
        lines.append("")
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--debug] COMMAND [options]",
        description=DESCRIPTION,
        epilog="\n".join(lines) + "\n" + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {dmc_hub.__version__}")
    parser.add_argument("--debug", action="store_true", help="on an error, show the traceback")
    return parser


def _options_parser(
    dataclass_types: Sequence[type], *, description: str | None, program: str | None
) -> HfArgumentParser:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            raise ValueError(f"{message}; `{self.prog} --help` lists the options")

    parser = Parser(dataclass_types, prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with defaults for these options")
    return parser


def _config_path(argv: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, nargs="?")
    return cast("Path | None", parser.parse_known_args(argv)[0].config)


@dataclass(frozen=True)
class _Entry:
    """A key of a YAML file: where it stands, as `file:line`, and its value."""

    where: str
    value: Any


def _read_config(path: Path) -> dict[str, _Entry]:
    """Read a YAML mapping; dashes in its keys count as underscores."""
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}:1: a config must hold `key: value` lines at its top level")
        entries: dict[str, _Entry] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value).replace("-", "_")
            where = f"{path}:{key_node.start_mark.line + 1}"
            if key in entries:
                raise ValueError(f"{where}: `{key}` is already given at {entries[key].where}; keep one of the two")
            entries[key] = _Entry(where, loader.construct_object(value_node, deep=True))
        return entries
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def _set_defaults_from_file(parser: HfArgumentParser, path: Path, hints: dict[str, Any]) -> None:
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest in hints}
    for key, entry in _read_config(path).items():
        if key not in actions:
            raise ValueError(f"{entry.where}: there is no option `{key}`{_did_you_mean(key, actions)}")
        try:
            value = _value_from_file(actions[key], hints[key], entry.value)
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{entry.where}: `{key}` {error}, but got {entry.value!r}") from error
        parser.set_defaults(**{key: value})
        actions[key].required = False


def _value_from_file(action: argparse.Action, hint: Any, value: Any) -> Any:
    """Check and convert a YAML value as the command line would; the error's message completes "`key` ..."."""
    kinds = {typing.get_origin(alternative) or alternative for alternative in _alternatives(hint)}
    if value is None and NoneType not in kinds:
        raise ValueError("cannot be null")
    if value is None or (isinstance(value, dict) and dict in kinds):
        return value
    if list in kinds and (isinstance(value, list) or str not in kinds):
        if not isinstance(value, list):
            raise ValueError("must be a list")
        return [_scalar_from_file(action, item) for item in value]
    if isinstance(value, bool) and bool in kinds:
        return value
    return _scalar_from_file(action, value)


def _scalar_from_file(action: argparse.Action, value: Any) -> Any:
    convert: Any = action.type or str
    choices = None if action.choices is None else list(action.choices)
    type_name = "bool" if convert.__name__ == "string_to_bool" else convert.__name__
    expected = f"must be one of {choices}" if choices else f"must be of type {type_name}"
    if isinstance(value, bool):
        raise ValueError(f"{expected} (YAML reads an unquoted yes, no, on and off as a boolean)")
    if not isinstance(value, int | float | str | date):
        raise ValueError(expected)
    try:
        converted = convert(str(value))
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(expected) from error
    if choices and converted not in choices:
        raise ValueError(expected)
    return converted


def _instance(cls: type, namespace: argparse.Namespace, hints: dict[str, Any]) -> Any:
    assert dataclasses.is_dataclass(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return cls(**{name: _as_enum(hints[name], getattr(namespace, name)) for name in names})


def _as_enum(hint: Any, value: Any) -> Any:
    """The member of the enumeration among the types of `hint`, if there is one, whose value is `value`."""
    for kind in _alternatives(hint):
        if isinstance(kind, type) and issubclass(kind, Enum) and value is not None:
            return kind(value)
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _unknown_option_message(parser: HfArgumentParser, argument: str) -> str:
    if not argument.startswith("-"):
        return f"`{argument}` belongs to no option; `{parser.prog} --help` lists the options"
    flag = argument.partition("=")[0]
    known = {f"--{action.dest.replace('_', '-')}" for action in parser._actions}
    guess = _did_you_mean(flag.replace("_", "-"), known)
    return f"there is no option `{flag}`{guess}; `{parser.prog} --help` lists the options"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(f'`{match}`' for match in matches)}?)" if matches else ""


if __name__ == "__main__":
    sys.exit(main())
