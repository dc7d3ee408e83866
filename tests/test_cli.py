"""The command line: its help, its one parser, and its errors."""

import signal
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from dmc_hub import cli

ROOT = Path(__file__).resolve().parents[1]


class Schedule(Enum):
    COSINE = "cosine"
    FLOW = "flow"


@dataclass(kw_only=True)
class RunArguments:
    task: str = field(metadata={"help": "Task to train on."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the runs."})
    action_selection: Literal["greedy", "softmax"] = "greedy"
    schedule: Schedule = Schedule.COSINE
    # Both spellings of Optional are accepted.
    checkpoint: Optional[Path] = None  # noqa: UP045


@dataclass(kw_only=True)
class TrainingOptions:
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate; all of it after warm-up."})
    max_steps: int | None = 100
    clip_sample: bool = False
    use_lora: bool = True
    scheduler_options: dict[str, Any] | str | None = None


def parse(*argv: str) -> tuple[RunArguments, TrainingOptions]:
    run, options = cli.parse_arguments(RunArguments, TrainingOptions, argv=argv, program="dmc-hub train")
    return run, options


def parse_file(tmp_path: Path, text: str, *argv: str) -> tuple[RunArguments, TrainingOptions]:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse("--config", str(path), *argv)


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert parse("--task", "nav1d-full") == (RunArguments(task="nav1d-full"), TrainingOptions())


def test_every_kind_of_option() -> None:
    run, options = parse(
        *("--task", "t", "--seeds", "1", "2", "--action-selection", "softmax", "--schedule", "flow"),
        *("--checkpoint", "runs/a", "--learning-rate=-1e-4", "--clip-sample", "--no-use-lora"),
    )
    assert run == RunArguments(
        task="t", seeds=[1, 2], action_selection="softmax", schedule=Schedule.FLOW, checkpoint=Path("runs/a")
    )
    assert options == TrainingOptions(learning_rate=-1e-4, clip_sample=True, use_lora=False)


@pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate"])
@pytest.mark.parametrize("joined", [False, True])
def test_dashes_and_underscores_are_the_same(flag: str, joined: bool) -> None:
    argv = [f"{flag}=0.5"] if joined else [flag, "0.5"]
    assert parse("--task", "t", *argv)[1].learning_rate == 0.5


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("1", True), ("no", False)])
def test_booleans_take_a_value_too(text: str, value: bool) -> None:
    assert parse("--task", "t", "--clip_sample", text)[1].clip_sample is value


def test_file_gives_defaults_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    text = """
        task: nav1d-partial
        seeds: [3, 4]
        learning-rate: 1e-4    # YAML alone reads this as a string
        max_steps: null
        clip_sample: true
        use_lora: false
        schedule: flow
        action_selection: softmax
        checkpoint: runs/a
        scheduler_options: {num_cycles: 2}
    """
    run, options = parse_file(tmp_path, text, "--seeds", "5", "--use-lora")
    assert run == RunArguments(
        task="nav1d-partial",
        seeds=[5],
        action_selection="softmax",
        schedule=Schedule.FLOW,
        checkpoint=Path("runs/a"),
    )
    assert options == TrainingOptions(
        learning_rate=1e-4,
        max_steps=None,
        clip_sample=True,
        use_lora=True,
        scheduler_options={"num_cycles": 2},
    )


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse_file(tmp_path, "# nothing yet\n", "--task", "t") == parse("--task", "t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learning_rte: 1",
            "config.yaml:1: there is no option `learning_rte` (did you mean `learning_rate`?)",
        ),
        ("# a comment\nzzz: 1", "config.yaml:2: there is no option `zzz`"),
        ("config: other.yaml", "config.yaml:1: there is no option `config`"),
        ("task: a\n\nseeds: [1]\ntask: b", "config.yaml:4: `task` is already given at"),
        ("max-steps: 1\nmax_steps: 2", "config.yaml:2: `max_steps` is already given at"),
        ("max_steps: many", "config.yaml:1: `max_steps` must be of type int, but got 'many'"),
        ("max_steps: 1.5", "config.yaml:1: `max_steps` must be of type int, but got 1.5"),
        ("max_steps: [1]", "config.yaml:1: `max_steps` must be of type int, but got [1]"),
        ("max_steps: true", "config.yaml:1: `max_steps` must be of type int"),
        ("clip_sample: maybe", "config.yaml:1: `clip_sample` must be of type bool, but got 'maybe'"),
        ("learning_rate: null", "config.yaml:1: `learning_rate` cannot be null, but got None"),
        ("seeds: 1", "config.yaml:1: `seeds` must be a list, but got 1"),
        ("seeds: [1, b]", "config.yaml:1: `seeds` must be of type int, but got [1, 'b']"),
        ("action_selection: best", "`action_selection` must be one of ['greedy', 'softmax'], but got 'best'"),
        ("action_selection: no", "(YAML reads an unquoted yes, no, on and off as a boolean), but got False"),
        ("schedule: linear", "`schedule` must be one of ['cosine', 'flow'], but got 'linear'"),
        ("task: {a: 1}", "config.yaml:1: `task` must be of type str, but got {'a': 1}"),
        ("- task", "config.yaml:1: a config must hold `key: value` lines at its top level"),
        ("task: [1", "config.yaml is not valid YAML"),
        ("task: !!python/object/apply:os.getcwd []", "config.yaml is not valid YAML"),
        ("task: \x01", "config.yaml is not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml") as error:
        parse_file(tmp_path, text, "--task", "t")
    assert message in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        parse("--task", "t", "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --task"),
        (
            ["--task", "t", "--learning-rte", "1"],
            "no option `--learning-rte` (did you mean `--learning-rate`?)",
        ),
        (["--task", "t", "--learning", "1"], "there is no option `--learning`"),
        (["--task", "t", "stray"], "`stray` belongs to no option"),
        (["--task", "t", "--max-steps", "many"], "invalid int value: 'many'"),
        (["--task", "t", "--action-selection", "best"], "invalid choice: 'best'"),
        (["--task", "t", "--config"], "--config: expected one argument"),
    ],
)
def test_a_bad_option_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="`dmc-hub train --help` lists the options") as error:
        parse(*argv)
    assert message in str(error.value)


def test_help_of_options_comes_from_the_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    assert "Task to train on." in text
    assert "Peak learning rate; all of it after warm-up. (default: 0.001)" in text


def test_help_names_every_command_and_an_example_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for name, command in cli.COMMANDS.items():
        assert f"\n  {name} " in text
        assert f"{command.example} ".startswith(f"dmc-hub {name} ")
        assert f"$ {command.example}\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "usage: dmc-hub" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_function_and_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*name.split(), "--help"])
    assert exit_.value.code == 0
    assert f"usage: dmc-hub {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "tasks"])
def test_every_example_can_be_parsed(name: str) -> None:
    types = cli.COMMANDS[name].parameter_types()
    arguments = cli.COMMANDS[name].example.removeprefix(f"dmc-hub {name}").split()
    assert [type(instance) for instance in cli.parse_arguments(*types, argv=arguments)] == types


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> str:
    """A command that fails or waits as its options say."""
    entry = cli.Command(f"{__name__}:fail", "fail on purpose", "dmc-hub fail")
    monkeypatch.setitem(cli.COMMANDS, "fail", entry)
    return "fail"


@dataclass
class FailArguments:
    error: Literal[
        "ValueError",
        "FileNotFoundError",
        "CheckpointError",
        "RuntimeError",
        "KeyboardInterrupt",
        "RunError",
        "StoppedBySignal",
    ]


def fail(arguments: FailArguments) -> None:
    from dmc_hub.checkpoint import CheckpointError
    from dmc_hub.errors import RunError, StoppedBySignal

    raise {
        "ValueError": ValueError("`steps` must be positive,\n  but got -1"),
        "FileNotFoundError": FileNotFoundError(2, "No such file or directory", "a/b"),
        "CheckpointError": CheckpointError("checkpoint-1 is incomplete"),
        "RuntimeError": RuntimeError("a mistake of ours"),
        "KeyboardInterrupt": KeyboardInterrupt(),
        "RunError": RunError("no environment is left"),
        "StoppedBySignal": StoppedBySignal("Stopped at step 3 of 8.", signal.SIGTERM),
    }[arguments.error]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("ValueError", 2, "dmc-hub: error: `steps` must be positive, but got -1\n"),
        ("FileNotFoundError", 2, "dmc-hub: error: [Errno 2] No such file or directory: 'a/b'\n"),
        ("CheckpointError", 2, "dmc-hub: error: checkpoint-1 is incomplete\n"),
        ("KeyboardInterrupt", 130, "dmc-hub: interrupted\n"),
        ("RunError", 1, "dmc-hub: error: no environment is left\n"),
        ("StoppedBySignal", 143, "dmc-hub: Stopped at step 3 of 8.\n"),
    ],
)
def test_users_get_one_line(command: str, capsys: pytest.CaptureFixture[str], error: str, code: int, line: str) -> None:
    assert cli.main([command, "--error", error]) == code
    assert capsys.readouterr() == ("", line)


def test_our_own_mistakes_are_one_line_too_and_a_variable_shows_where(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([command, "--error", "RuntimeError"]) == 1
    message = "RuntimeError: a mistake of ours This is a failure inside the program; DMC_HUB_TRACEBACK=1 shows where."
    assert capsys.readouterr().err == f"dmc-hub: error: {message}\n"
    monkeypatch.setenv("DMC_HUB_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli.main([command, "--error", "RuntimeError"])


def test_debug_shows_the_traceback(command: str) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        cli.main(["--debug", command, "--error", "ValueError"])


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["algin", "--task", "t"]) == 2
    message = "`algin` is not a command (did you mean `align`?); `dmc-hub --help` lists them all"
    assert capsys.readouterr().err == f"dmc-hub: error: {message}\n"


def test_tasks_lists_the_known_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks"]) == 0
    assert "nav1d-full " in capsys.readouterr().out


def test_a_config_of_transformers_can_be_parsed(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    path = tmp_path / "config.yaml"
    path.write_text(
        "output-dir: a\nlr_scheduler_kwargs: {num_cycles: 2}\nreport_to: none\nlogging_steps: 0.5\n"
        "eval_strategy: 'no'\nmax_grad_norm: 1e-1\nlabel_names: [a, b]\nuse_cpu: true\n"
    )
    (arguments,) = cli.parse_arguments(
        TrainingArguments, argv=["--config", str(path), "--output-dir", str(tmp_path), "--seed", "7"]
    )
    assert (arguments.output_dir, arguments.seed) == (str(tmp_path), 7)
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (arguments.report_to, arguments.logging_steps, arguments.max_grad_norm) == ([], 0.5, 0.1)
    assert arguments.eval_strategy == "no"
    assert arguments.label_names == ["a", "b"]


def test_a_collapsed_training_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapse(*_: Any) -> None:
        raise FloatingPointError("Step 3: the loss is nan.")

    monkeypatch.setattr(cli, "run_command", collapse)
    assert cli.main(["train-ddpo"]) == 1
    assert capsys.readouterr().err == "dmc-hub: error: Step 3: the loss is nan.\n"
