"""Settings: precedence, one-line errors, and a saved config that repeats the run."""

import dataclasses
import json
from dataclasses import dataclass, field

import pytest

from visbio_diffusers.config import TrainConfig, parse, run


@dataclass(frozen=True, kw_only=True)
class ScriptConfig(TrainConfig):
    """Settings of a script."""

    resolution: int = field(metadata={"help": "edge of the images in pixels"})
    dataset_name: list[str] = field(default_factory=lambda: ["bloodmnist"], metadata={"help": "image sets"})
    dataset_weights: list[float] = field(default_factory=list, metadata={"help": "share of each set"})


PRESETS = {"tiny": {"resolution": 28, "seed": 1, "max_train_steps": 2, "use_ema": False}, "large": {"resolution": 64}}


def test_defaults_yield_to_preset_to_file_to_flags(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"max_train_steps": 3, "seed": 2, "dataset_name": ["a", "b"]}))
    argv = ["--output_dir", "out", "--preset", "tiny", "--config", str(file), "--seed", "3", "--use-ema"]
    config = parse(ScriptConfig, PRESETS, argv)
    assert (config.learning_rate, config.resolution, config.max_train_steps, config.seed) == (1e-4, 28, 3, 3)
    assert config.use_ema and config.dataset_name == ["a", "b"]
    assert parse(ScriptConfig, PRESETS, [*argv, "--dataset_name", "c"]).dataset_name == ["c"]
    assert not parse(ScriptConfig, PRESETS, [*argv, "--no_use_ema"]).use_ema
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4


def test_saved_config_repeats_the_run(tmp_path):
    argv = [
        "--output_dir",
        str(tmp_path),
        "--preset",
        "tiny",
        "--max_grad_norm",
        "inf",
        "--dataset_weights",
        "-1",
        "2",
    ]
    config = parse(ScriptConfig, PRESETS, [*argv, "--resume_from_checkpoint", "latest"])
    config.save(tmp_path / "config.json")
    again = parse(ScriptConfig, PRESETS, ["--config", str(tmp_path / "config.json")])
    assert again == dataclasses.replace(config, resume_from_checkpoint="")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--output_dir", "out"], "--resolution"),
        (["--preset", "tiny"], "--output_dir"),
        (["--preset", "huge"], "unknown preset 'huge'; there are: tiny, large"),
        (["--output_dir", "out", "--preset", "tiny", "--learning_rat", "1"], "--learning_rat"),
        (["--output_dir", "out", "--preset", "tiny", "--lr_scheduler", "cubic"], "'cubic'"),
        (["--output_dir", "out", "--preset", "tiny", "--seed", "x"], "invalid int value: 'x'"),
        (["--output_dir", "out", "--preset", "tiny", "--max_train_steps", "0"], "max_train_steps must be at least 1"),
        (
            ["--output_dir", "out", "--preset", "tiny", "--learning_rate", "-1"],
            "learning_rate must be above 0, got -1",
        ),
        (["--output_dir", "out", "--preset", "tiny", "--ema_decay", "1"], "ema_decay must be in [0, 1), got 1.0"),
        (["--output_dir", "out", "--preset", "tiny", "--lr_warmup_steps", "5"], "constant_with_warmup"),
        (["--output_dir", "", "--preset", "tiny"], "output_dir is empty"),
        (["--config", "absent.json"], "absent.json"),
        (["--config", "list.json"], "list.json must hold one JSON object"),
        (["--config", "unknown.json"], "unknown.json holds unknown settings: colour"),
        (["--config", "wrong.json", "--output_dir", "out"], "invalid int value: 'many'"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "unknown.json").write_text('{"colour": 1}')
    (tmp_path / "wrong.json").write_text('{"resolution": 28, "seed": "many"}')
    with pytest.raises(SystemExit) as exit_info:
        parse(ScriptConfig, PRESETS, argv)
    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message.count("\n") == 1 and named in message


def test_choices_hold_without_the_command_line():
    with pytest.raises(ValueError, match="mixed_precision must be one of no, fp16, bf16, got 'fp8'"):
        TrainConfig(output_dir="out", mixed_precision="fp8")


def test_every_flag_has_help(capsys):
    assert all(each.metadata["help"] for each in dataclasses.fields(TrainConfig))
    with pytest.raises(SystemExit) as exit_info:
        parse(ScriptConfig, PRESETS, ["--help"])
    assert exit_info.value.code == 0
    assert "tiny, large" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(0, 0), (15, 143), (ValueError("bad value"), "error: bad value"), (OSError("disk full"), "error: disk full")],
)
def test_run_exit_codes(outcome, code):
    def main(config):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as exit_info:
        run(main, TrainConfig(output_dir="out"))
    assert exit_info.value.code == code
