"""Train a compact BERT for biomedical captions: a WordPiece vocabulary, then masked-language-model pretraining.

accelerate launch train_scripts/train_text_encoder.py --preset blood --corpus FILE.jsonl FILE.csv --output_dir DIR
The folder it writes loads with `BertModel.from_pretrained` and `AutoTokenizer.from_pretrained`, and is what
train_text_to_image.py takes as `--text_encoder`.
"""

import csv
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizerFast, DataCollatorForLanguageModeling

from visbio_diffusers.captions import load_bank
from visbio_diffusers.checkpoints import save_folder
from visbio_diffusers.config import TrainConfig, parse, run
from visbio_diffusers.training import fit, make_accelerator, make_lr_scheduler, make_optimizer


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(TrainConfig):
    """Train a compact BERT on captions and biomedical text."""

    corpus: list[str] = field(
        default_factory=list, metadata={"help": "text files: .jsonl (key abstract or text), .csv (column caption), .txt"}
    )
    caption_banks: list[str] = field(
        default_factory=lambda: ["bloodmnist"], metadata={"help": "caption banks to train on, names or .yaml files"}
    )
    captions_per_class: int = field(default=4096, metadata={"help": "distinct training captions of each class"})
    caption_share: float = field(default=0.5, metadata={"help": "share of the batches that hold captions"})
    vocab_size: int = field(default=6144, metadata={"help": "entries of the WordPiece vocabulary"})
    hidden_size: int = field(default=192, metadata={"help": "width of the encoder"})
    num_hidden_layers: int = field(default=3, metadata={"help": "transformer layers"})
    max_length: int = field(default=64, metadata={"help": "tokens per text in training"})
    mlm_probability: float = field(default=0.2, metadata={"help": "share of the tokens to predict"})


PRESETS = {
    "tiny": dict(
        vocab_size=1024, hidden_size=32, num_hidden_layers=1, captions_per_class=64, train_batch_size=8, report_to="none"
    ),
    "blood": dict(
        train_batch_size=128, max_train_steps=700, learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=50,
        use_ema=False, checkpointing_steps=200, checkpoints_total_limit=1,
    ),  # see model_cards/visbio-blood-28/README.md for the result
}  # fmt: skip


def read_corpus(path: str) -> list[str]:
    """Return the texts of a .jsonl, .csv or .txt file."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no corpus file {path}")
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.open(encoding="utf-8")]
        texts = [row.get("abstract") or row.get("text") or "" for row in rows]
    elif file.suffix == ".csv":
        texts = [row.get("caption") or row.get("text") or "" for row in csv.DictReader(file.open(encoding="utf-8"))]
    else:
        texts = file.read_text(encoding="utf-8").splitlines()
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text: .jsonl needs a key `abstract` or `text`, .csv a column `caption`")
    return texts


def training_captions(config: TextEncoderConfig) -> list[str]:
    """Return distinct training captions of all classes and subtypes of the banks."""
    captions = []
    for name in config.caption_banks:
        bank = load_bank(name)
        for label, words in enumerate(bank.classes):
            vector = np.eye(len(bank.classes), dtype=int)[label] if bank.no_finding else label
            for subtype in [None, *words.subtypes]:
                captions += bank.pool(vector, config.captions_per_class, config.seed, subtype=subtype)
    return captions


def train_tokenizer(texts: list[str], config: TextEncoderConfig) -> BertTokenizerFast:
    """Learn a lower-case WordPiece vocabulary, with BERT's special tokens."""
    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=config.vocab_size, min_frequency=2, show_progress=False)
    return BertTokenizerFast(tokenizer_object=learner._tokenizer, do_lower_case=True, model_max_length=128)


def text_stream(captions: list[str], corpus: list[str], tokenizer: BertTokenizerFast, config: TextEncoderConfig):
    """Return a stream of masked batches; batch `index` depends on (seed, index) alone."""
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.mlm_probability)
    captions = tokenizer(captions, truncation=True, max_length=config.max_length)["input_ids"]
    body = config.max_length - 2
    chunks = []
    for ids in tokenizer(corpus, add_special_tokens=False, verbose=False)["input_ids"] if corpus else []:
        for start in range(0, len(ids), body):
            chunks.append([tokenizer.cls_token_id, *ids[start : start + body], tokenizer.sep_token_id])

    def stream(start: int):
        index = start
        while True:
            rng = np.random.default_rng([config.seed, index])
            source = captions if not chunks or rng.random() < config.caption_share else chunks
            rows = rng.integers(len(source), size=config.train_batch_size)
            yield dict(collate([{"input_ids": source[row]} for row in rows]))
            index += 1

    return stream


def masked_lm_loss(model, batch):
    """Return the mean cross-entropy over the masked tokens; logits are computed for those alone."""
    labels = batch["labels"]
    hidden_states = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    masked = labels != -100
    logits = model.cls(hidden_states[masked])
    accuracy = (logits.argmax(-1) == labels[masked]).float().mean()
    return F.cross_entropy(logits, labels[masked]), {"mlm_accuracy": accuracy}


def main(config: TextEncoderConfig) -> int:
    """Train, and write the encoder and its tokenizer; return the number of the signal that interrupted it, or 0."""
    accelerator = make_accelerator(config)
    captions, corpus = training_captions(config), [text for path in config.corpus for text in read_corpus(path)]
    tokenizer = train_tokenizer(captions + corpus, config)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=max(config.hidden_size // 64, 1),
            intermediate_size=4 * config.hidden_size,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    logger.info(f"{len(captions)} captions, {len(corpus)} texts, {model.num_parameters() / 1e6:.2f} M parameters")
    optimizer = make_optimizer(model.parameters(), config)
    lr_scheduler = make_lr_scheduler(optimizer, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    stream = text_stream(captions, corpus, tokenizer, config)
    result = fit(accelerator, model, optimizer, lr_scheduler, stream, masked_lm_loss, config)
    if accelerator.is_main_process and not result.signum:
        trained = accelerator.unwrap_model(model)
        encoder = BertModel(trained.config)  # with a pooler, which plain `BertModel.from_pretrained` expects
        encoder.load_state_dict(trained.bert.state_dict(), strict=False)

        def write(folder: Path) -> None:
            encoder.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        save_folder(Path(config.output_dir, "text_encoder"), write)
    accelerator.end_training()
    return result.signum


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    run(main, parse(TextEncoderConfig, PRESETS))
