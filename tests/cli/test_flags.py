"""Flags, help and errors of the commands."""

import dataclasses
import subprocess
import sys

import pytest

from dinalrm_jax.__main__ import COMMANDS
from dinalrm_jax.cli import command, configs, options
from dinalrm_jax.cli.flags import UsageError, flags_of, help_text, parse
from dinalrm_jax.mapping import ConfigError
from tests.conftest import ROOT

OPTIONS = [
    options.TrainOptions, options.EvaluateOptions, options.PreprocessOptions, options.ConvertOptions,
    options.ScoreOptions, options.ServeOptions, options.BenchmarkOptions, options.ClientOptions,
]  # fmt: skip
SCORE = ["--checkpoint=c", "--prompt=a"]
GENERATE = ["--base-model=b", "--prompt=a", "--output=o"]
DATA = ["--checkpoint=c", "--benchmark=records", "--data=d"]
RECORDS = ["--dataset=hpdv3", "--source=s", "--output=o"]


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_every_flag_has_a_sentence(cls):
    text = help_text("command", "About.", cls)
    for flag in flags_of(cls):
        assert flag.help.endswith("."), flag.name
        assert flag.help[0].isupper() or not flag.help[0].isalpha(), flag.name
        assert flag.help.split()[0] not in ("Of", "That"), flag.name
        assert f"--{flag.name}" in text or flag.metavar in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name):
    result = run(f"dinalrm_jax.{name}", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: python -m dinalrm_jax.{name}")


def test_kinds_of_values():
    found = parse(options.ScoreOptions, [*SCORE, "--batch_size", "4", "--sigma", "0.2,0.5", "x.png", "--", "--y.png"])
    assert (found.batch_size, found.level, found.images) == (4, (0.2, 0.5), ("x.png", "--y.png"))
    assert parse(options.ScoreOptions, SCORE).level == 0.4
    assert parse(options.ScoreOptions, [*SCORE, "--sigma=0.3"]).level == 0.3
    assert parse(options.ScoreOptions, [*SCORE, "--sigma=0.3", "--sigma=0.4", "--json", "-"]).level == (0.3, 0.4)
    evaluate = ["--checkpoint=c", "--benchmark=hpdv2", "--data=d"]
    for negation in ("--noshared-noise", "--no-shared_noise", "--shared-noise=false"):
        assert not parse(options.EvaluateOptions, [*evaluate, negation]).shared_noise
    assert parse(options.EvaluateOptions, [*evaluate, "--ensemble="]).ensemble == ()
    served = parse(options.ServeOptions, ["--model_path=m", "--base-model-path=b", "--port=0", "--warmup=8x8x5,4x4x5"])
    assert (served.checkpoint, served.base_model) == ("m", "b")
    assert served.server == dataclasses.replace(options.ServerConfig(), port=0, warmup=("8x8x5", "4x4x5"))
    trained = parse(options.TrainOptions, ["--config", "f.py", "--config.seed", "1", "--config.a.b=None"])
    assert trained.overrides == ("--config.seed=1", "--config.a.b=None")


@pytest.mark.parametrize(
    ("cls", "argv", "message"),
    [
        (options.ScoreOptions, ["--chekpoint=c"], "unknown flag --chekpoint; did you mean --checkpoint?"),
        (options.ScoreOptions, [*SCORE, "--sigma=x"], "--sigma takes numbers between commas, got 'x'"),
        (options.ScoreOptions, [*SCORE, "--samples=0"], "--samples must be at least 1, got 0"),
        (options.ScoreOptions, [*SCORE, "--sigma=0.1", "--ensemble=0.2,0.3"], "either --sigma or --ensemble"),
        (options.ScoreOptions, [*SCORE, "--seed"], "--seed needs a value: a whole number"),
        (options.ScoreOptions, ["--prompt=a"], r"this command needs --checkpoint \("),
        (options.ScoreOptions, [*SCORE, "--prompt-file=b"], "give either --prompt or --prompt-file"),
        (options.ScoreOptions, [*SCORE, "--dtype=bfloat"], "takes one of auto, float32.*did you mean bfloat16"),
        (options.GenerateOptions, [*GENERATE, "--sigma=0.4"], "give --checkpoint too"),
        (options.GenerateOptions, [*GENERATE, "--guidance=1", "--negative-prompt=b"], "needs guidance above 1"),
        (options.GenerateOptions, [*GENERATE, "--guidance=nan"], "--guidance must be at least 1, got nan"),
        (options.GenerateOptions, [*GENERATE, "--text-length=0"], "--text-length must be at least 1, got 0"),
        (options.ServeOptions, ["--checkpoint=c", "--port=70000"], "port must lie in 0..65535, got 70000"),
        (options.ScoreOptions, [*SCORE, "--sigma=1.5"], r"--sigma takes levels in \[0, 1\].*got \(1.5,\)"),
        (options.EvaluateOptions, [*DATA, "--ensemble=0.2,2"], r"--ensemble takes levels in \[0, 1\]"),
        (options.EvaluateOptions, [*DATA, "--sigma=", "--ensemble="], "--sigma and --ensemble are both empty"),
        (options.PreprocessOptions, [*RECORDS, "--threads=0"], "threads must be at least 1, got 0"),
        (options.ClientOptions, ["8000"], "unexpected argument '8000'"),
        (options.ConvertOptions, ["released", "--output=o", "--checkpoint=c"], "released needs --base-model"),
        (options.ConvertOptions, ["releas", "--output=o"], "did you mean released"),
    ],
)  # fmt: skip
def test_usage_errors(cls, argv, message):
    with pytest.raises(UsageError, match=message):
        parse(cls, argv)


def test_the_list_of_commands():
    result = run("dinalrm_jax")
    assert result.returncode == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    result = run("dinalrm_jax", "trian")
    assert (result.returncode, result.stderr) == (2, "error: unknown command 'trian'; did you mean train?\n")
    result = run("dinalrm_jax", "score", "--promt=a")
    assert (result.returncode, result.stderr) == (2, "error: unknown flag --promt; did you mean --prompt?\n")


def test_a_packaged_config_from_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = configs.load_config("configs/hpdv2.py", ["--config.seed=7", "--config.generator=None"], ())
    assert (config.name, config.seed, config.generator) == ("hpdv2", 7, None)
    assert "taking the packaged" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"no config file configs/no.py; the packaged .* configs/quickstart.py"):
        configs.find_config("configs/no.py")


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("configs/quickstart.py:foo", "configs/quickstart.py:foo: this config knows the variant :ensemble, not :foo"),
        ("configs/ablation.py:x", "configs/ablation.py:x: this config takes a number of seeds (:1), not :x"),
        ("configs/own.py:x", "configs/own.py has no variants, and :x names one"),
    ],
)
def test_a_variant_that_a_config_refuses_is_one_line(file, told):
    with pytest.raises(UsageError) as refused:
        configs.load_config(file, [], ())
    assert str(refused.value) == told


@pytest.mark.parametrize("override", ["reward.judge=clip", "reward.judge.kind=clip"])
def test_a_flag_for_a_section_that_is_not_there_is_one_line(override):
    with pytest.raises(
        UsageError, match="^config.reward.judge is None in configs/lpo.py, and a flag cannot say what kind"
    ):
        configs.load_config("configs/lpo.py", [f"--config.{override}"], ())


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (ConfigError("no such thing"), 2, "error: no such thing\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted; it is kept\n"),
        (None, 1, ""),
    ],
)
def test_how_a_command_ends(monkeypatch, capsys, raised, status, told):
    """After an error in one line, after Ctrl-C on a line of its own, and with what it returns."""
    monkeypatch.setattr(command, "quieten_libraries", lambda: None)  # of the whole process
    monkeypatch.setattr(sys, "argv", ["score", *SCORE])

    def main(options):
        assert options.prompt == "a"
        if raised is not None:
            raise raised
        return 1

    with pytest.raises(SystemExit) as end:
        command.run_command(main, options.ScoreOptions, errors=(ConfigError,), interrupted="it is kept")
    assert (end.value.code, capsys.readouterr().err) == (status, told)


def test_a_bug_that_ends_a_command_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(command, "quieten_libraries", lambda: None)
    monkeypatch.setattr(sys, "argv", ["score", *SCORE])
    with pytest.raises(ZeroDivisionError):
        command.run_command(lambda options: 1 / 0, options.ScoreOptions, errors=(ConfigError,), interrupted="")
