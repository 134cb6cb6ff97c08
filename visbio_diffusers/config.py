"""Training settings: one frozen dataclass that is the flags, the JSON file and the documentation at once."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from visbio_diffusers.files import whole_file


def flag(default: Any, help: str) -> Any:
    """Return a field of a settings class with a default and the text that `--help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings shared by every training script; subclass it to add the settings of one script.

    The help text of each field is its documentation (`--help` prints it). All `*_steps` count optimizer steps.

    Raises:
        ValueError: if a value is outside its range; the message holds the field and the value.
    """

    output_dir: str = field(metadata={"help": "folder for checkpoints, logs and the trained model"})
    seed: int = flag(0, "seed of the weights, the noise and the order of the data")
    train_batch_size: int = flag(64, "images per process and micro-batch")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    max_train_steps: int = flag(1000, "optimizer steps to take in all, resumed ones included")
    max_train_minutes: float = flag(0.0, "end after so many minutes of steps, resumed ones too; 0 is no limit")
    learning_rate: float = flag(1e-4, "highest learning rate of AdamW")
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine", "linear"] = flag(
        "constant", "shape of the learning rate over the optimizer steps"
    )
    lr_warmup_steps: int = flag(0, "optimizer steps of linear warm-up (not for lr_scheduler constant)")
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment")
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment")
    adam_weight_decay: float = flag(1e-2, "weight decay of matrices and filters; biases and norms have none")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; inf turns it off")
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("no", "precision of the forward pass; weights stay fp32")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")
    compile: bool = flag(False, "compile the model with torch.compile")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = flag(
        "default", "mode of torch.compile; reduce-overhead uses CUDA graphs"
    )
    use_ema: bool = flag(True, "average the weights over the training and keep the average")
    ema_decay: float = flag(0.9999, "highest decay of the average; it starts low and rises")
    checkpointing_steps: int = flag(500, "save a checkpoint every so many optimizer steps, and at the end")
    checkpoints_total_limit: int = flag(3, "keep this many newest checkpoints; 0 keeps all")
    resume_from_checkpoint: str = flag("", "latest, or a checkpoint folder; empty starts afresh")
    report_to: str = flag("tensorboard", "none, or any tracker that Accelerate knows, such as wandb")
    logging_steps: int = flag(10, "report the loss every so many optimizer steps")
    push_to_hub: bool = flag(False, "publish what was trained on the Hub")
    hub_model_id: str = flag("", "repo to publish to, as owner/name; default is the name of output_dir, in your space")
    hub_private_repo: bool = flag(False, "make a new repo private")
    dataloader_num_workers: int = flag(0, "processes that load data; 0 loads in the training process")

    def __post_init__(self) -> None:
        """Check every value once, however it was given."""
        if not self.output_dir:
            raise ValueError("output_dir is empty; name a folder")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {getattr(self, name)!r}")
        counts = "train_batch_size gradient_accumulation_steps max_train_steps checkpointing_steps logging_steps"
        self._require("at least 1", lambda value: value >= 1, counts)
        counts = "seed max_train_minutes lr_warmup_steps adam_weight_decay checkpoints_total_limit"
        counts += " dataloader_num_workers"
        self._require("at least 0", lambda value: value >= 0, counts)
        self._require("above 0", lambda value: value > 0, "learning_rate adam_epsilon max_grad_norm")
        self._require("in [0, 1)", lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 ema_decay")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                f"lr_scheduler=constant has no warm-up, got lr_warmup_steps={self.lr_warmup_steps}; "
                "use constant_with_warmup"
            )

    def _require(self, wording: str, condition: Callable[[float], bool], names: str) -> None:
        for name in names.split():
            if not condition(getattr(self, name)):
                raise ValueError(f"{name} must be {wording}, got {getattr(self, name)}")

    def save(self, path: str | Path) -> None:
        """Write every setting to the JSON file `path`, so that `--config path` repeats the run from its start.

        `resume_from_checkpoint` is left out: it describes how one process began, not the run.
        """
        settings = asdict(self)
        del settings["resume_from_checkpoint"]
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")


ConfigClass = TypeVar("ConfigClass", bound=TrainConfig)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse(
    config_class: type[ConfigClass],
    presets: dict[str, dict[str, Any]],
    argv: list[str] | None = None,
    prog: str | None = None,
) -> ConfigClass:
    """Build a config from defaults < `--preset NAME` < `--config FILE.json` < flags.

    Args:
        config_class (subclass of `TrainConfig`): its fields are the flags.
        presets (`dict`): name -> settings by field name.
        argv (`list[str]`, *optional*): the command line without the program; `sys.argv[1:]` by default.
        prog (`str`, *optional*): the program, as help and errors name it; that of the process by default.

    Raises:
        SystemExit: with code 2 and one line on stderr, for an unknown flag, preset or setting, a value outside its
            choices or range, a missing setting, or an unreadable file.
    """
    argv = sys.argv[1:] if argv is None else argv
    sources = _Parser(add_help=False, allow_abbrev=False)
    description = (config_class.__doc__ or "").split("\n")[0]
    parser = _Parser(config_class, allow_abbrev=False, description=description, prog=prog)
    for each in (sources, parser):
        if presets:
            each.add_argument("--preset", metavar="NAME", help=f"one of: {', '.join(presets)}")
        each.add_argument("--config", metavar="FILE.json", help="settings saved by an earlier run")
    chosen, _ = sources.parse_known_args(argv)

    flags: list[str] = []
    if presets and chosen.preset is not None:
        if chosen.preset not in presets:
            parser.error(f"unknown preset {chosen.preset!r}; there are: {', '.join(presets) or 'none'}")
        flags += _as_flags(parser, config_class, presets[chosen.preset], f"preset {chosen.preset}")
    if chosen.config is not None:
        flags += _as_flags(parser, config_class, _read_json(parser, chosen.config), chosen.config)

    for action in parser._actions:
        action.nargs = "*" if action.nargs == "+" else action.nargs  # an empty list can be given too
    values = vars(parser.parse_args(flags + argv))
    try:
        return config_class(**{each.name: values[each.name] for each in fields(config_class)})
    except ValueError as error:
        parser.error(str(error))


def run(main: Callable[[ConfigClass], int], config: ConfigClass) -> NoReturn:
    """Call `main(config)` and leave the process with a code that shells and schedulers understand.

    Args:
        main: a script; returns the number of the signal that interrupted it, or 0 (`FitResult.signum`).

    Raises:
        SystemExit: 0 when done, 128 + signal when interrupted, 1 with one line on stderr for an error that the
            user can mend (ValueError, OSError, FloatingPointError).
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("visbio_diffusers").setLevel(logging.INFO)
    try:
        signum = main(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    sys.exit(128 + signum if signum else 0)


def _read_json(parser: _Parser, path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        parser.error(f"cannot read --config {path}: {error}")
    if not isinstance(settings, dict):
        parser.error(f"--config {path} must hold one JSON object of settings")
    return settings


def _as_flags(parser: _Parser, config_class: type[TrainConfig], settings: dict[str, Any], source: str) -> list[str]:
    """Return settings as command-line flags, so that files and presets pass the same checks as flags."""
    unknown = set(settings) - {each.name for each in fields(config_class)}
    if unknown:
        parser.error(f"{source} holds unknown settings: {', '.join(sorted(unknown))}")
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, list | tuple):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags
