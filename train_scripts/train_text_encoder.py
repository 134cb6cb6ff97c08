"""Train a compact BERT for biomedical captions: a WordPiece vocabulary, then masked-language-model pretraining.

Where a batch holds captions, a linear head also names their class from the mean hidden state, so that different
wordings of one cell come to lie together; the head is not kept.

accelerate launch train_scripts/train_text_encoder.py --preset blood --corpus FILE.jsonl FILE.csv --output_dir DIR
The folder it writes loads with `BertModel.from_pretrained` and `AutoTokenizer.from_pretrained`, and is what
train_text_to_image.py takes as `--text_encoder`.
"""

import itertools
import logging
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import BertWordPieceTokenizer
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
)

from visbio_diffusers import hub
from visbio_diffusers.captions import load_bank
from visbio_diffusers.checkpoints import save_folder
from visbio_diffusers.config import TrainConfig, parse, run
from visbio_diffusers.data.corpus import read_corpus
from visbio_diffusers.evaluation import environment, write_results
from visbio_diffusers.training import ema_hook, fit, make_accelerator, make_ema, make_lr_scheduler, make_optimizer


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(TrainConfig):
    """Train a compact BERT on captions and biomedical text."""

    corpus: list[str] = field(
        default_factory=list,
        metadata={"help": "text files: .jsonl (key abstract or text), .csv (column caption), .txt"},
    )
    caption_banks: list[str] = field(
        default_factory=lambda: ["bloodmnist"], metadata={"help": "caption banks to train on, names or .yaml files"}
    )
    captions_per_class: int = field(default=8192, metadata={"help": "distinct training captions of each class"})
    caption_share: float = field(default=0.5, metadata={"help": "share of the batches that hold captions"})
    vocab_size: int = field(default=6144, metadata={"help": "entries of the WordPiece vocabulary"})
    hidden_size: int = field(default=192, metadata={"help": "width of the encoder"})
    num_hidden_layers: int = field(default=3, metadata={"help": "transformer layers"})
    max_length: int = field(default=64, metadata={"help": "tokens per text in training"})
    mlm_probability: float = field(default=0.2, metadata={"help": "share of the tokens to predict"})
    class_weight: float = field(default=1.0, metadata={"help": "weight of naming the class of a caption; 0 is off"})
    distraction: float = field(default=0.3, metadata={"help": "share of captions with foreign words before or behind"})
    pretrained_model_name_or_path: str = field(default="", metadata={"help": "encoder and vocabulary to start from"})

    def __post_init__(self) -> None:
        """Check the settings of this script too."""
        super().__post_init__()
        if self.dataloader_num_workers:
            raise ValueError("dataloader_num_workers must be 0: texts are prepared in the training process")


PRESETS = {
    "tiny": dict(
        vocab_size=1024, hidden_size=32, num_hidden_layers=1, captions_per_class=64, train_batch_size=8, use_ema=False,
        report_to="none",
    ),
    "blood": dict(
        train_batch_size=128, max_train_steps=700, learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=50,
        use_ema=False, checkpointing_steps=200, checkpoints_total_limit=1,
    ),  # see model_cards/visbio-blood-28/README.md for the result
}  # fmt: skip


def training_captions(config: TextEncoderConfig) -> tuple[list[str], list[int]]:
    """Return distinct training captions of all classes and subtypes of the banks, and the class of each."""
    captions, labels = [], []
    for name in config.caption_banks:
        bank = load_bank(name)
        first = max(labels, default=-1) + 1
        for label, words in enumerate(bank.classes):
            vector = np.eye(len(bank.classes), dtype=int)[label] if bank.no_finding else label
            for subtype in [None, *words.subtypes]:
                pool = bank.pool(vector, config.captions_per_class, config.seed, subtype=subtype)
                captions += pool
                labels += [first + label] * len(pool)
    return captions, labels


def train_tokenizer(texts: list[str], config: TextEncoderConfig) -> BertTokenizerFast:
    """Learn a lower-case WordPiece vocabulary, with BERT's special tokens."""
    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=config.vocab_size, min_frequency=2, show_progress=False)
    return BertTokenizerFast(tokenizer_object=learner._tokenizer, do_lower_case=True, model_max_length=128)


def distract(caption: str, corpus: list[str], rng: np.random.Generator) -> str:
    """Put a few consecutive words of a random text before or behind a caption."""
    words = corpus[rng.integers(len(corpus))].split()
    start = rng.integers(len(words))
    foreign = " ".join(words[start : start + rng.integers(2, 9)])
    return f"{foreign} {caption}" if rng.random() < 0.5 else f"{caption} {foreign}"


def text_stream(
    captions: list[str], labels: list[int], corpus: list[str], tokenizer, config: TextEncoderConfig, rank: int
):
    """Return a stream of masked batches; batch `index` depends on (seed, index, rank) alone."""
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.mlm_probability)
    body = config.max_length - 2
    chunks = []
    for ids in tokenizer(corpus, add_special_tokens=False, verbose=False)["input_ids"] if corpus else []:
        for start in range(0, len(ids), body):
            chunks.append([tokenizer.cls_token_id, *ids[start : start + body], tokenizer.sep_token_id])

    def batch(index: int) -> dict:
        rng = np.random.default_rng([config.seed, index, rank])
        if chunks and rng.random() >= config.caption_share:
            rows = rng.integers(len(chunks), size=config.train_batch_size)
            return dict(collate([{"input_ids": chunks[row]} for row in rows]))
        rows = rng.integers(len(captions), size=config.train_batch_size)
        texts = [
            distract(captions[row], corpus, rng) if corpus and rng.random() < config.distraction else captions[row]
            for row in rows
        ]
        ids = tokenizer(texts, truncation=True, max_length=config.max_length)["input_ids"]
        named = torch.tensor([labels[row] for row in rows])
        return {**collate([{"input_ids": each} for each in ids]), "class_labels": named}

    return lambda start: map(batch, itertools.count(start))


class CaptionEncoder(nn.Module):
    """A BERT with its masked-language-model head, and a linear head that names the class of a caption."""

    def __init__(self, bert: BertForMaskedLM, num_classes: int):
        super().__init__()
        self.mlm = bert
        self.classify = nn.Linear(bert.config.hidden_size, num_classes)

    def forward(self, input_ids, attention_mask, masked):
        """Return vocabulary logits (masked tokens, vocabulary) and class logits (batch, classes)."""
        hidden_states = self.mlm.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return self.mlm.cls(hidden_states[masked]), self.classify((hidden_states * mask).sum(1) / mask.sum(1))


def caption_loss(model, batch, class_weight):
    """Return the mean cross-entropy over the masked tokens, plus that over the classes where the batch has them."""
    masked = batch["labels"] != -100
    logits, class_logits = model(batch["input_ids"], batch["attention_mask"], masked)
    loss = F.cross_entropy(logits, batch["labels"][masked])
    if "class_labels" in batch:
        loss = loss + class_weight * F.cross_entropy(class_logits, batch["class_labels"])
    else:
        loss = loss + 0 * class_logits.sum()  # DDP wants a gradient, if none but zero, of every parameter
    return loss, {}


def load_models(config: TextEncoderConfig, texts: list[str]) -> tuple[BertForMaskedLM, BertTokenizerFast]:
    """Return a pretrained encoder with its vocabulary, or new ones."""
    if config.pretrained_model_name_or_path:
        name = config.pretrained_model_name_or_path
        return BertForMaskedLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    tokenizer = train_tokenizer(texts, config)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=max(config.hidden_size // 64, 1),
        intermediate_size=4 * config.hidden_size,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForMaskedLM(shape), tokenizer


def main(config: TextEncoderConfig) -> int:
    """Train, and write the encoder and its tokenizer; return the number of the signal that interrupted it, or 0."""
    accelerator = make_accelerator(config)
    repo_id = hub.repo_of_training(config, accelerator.is_main_process)
    corpus = [text for path in config.corpus for text in read_corpus(path)]
    captions, labels = training_captions(config)
    bert, tokenizer = load_models(config, captions + corpus)
    model = CaptionEncoder(bert, max(labels) + 1)
    if config.gradient_checkpointing:
        bert.gradient_checkpointing_enable()
    if config.compile:
        bert.bert.compile()
    logger.info(f"{len(captions)} captions, {len(corpus)} texts, {bert.bert.num_parameters() / 1e6:.2f} M parameters")
    optimizer = make_optimizer(model.parameters(), config)
    lr_scheduler = make_lr_scheduler(optimizer, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = make_ema(accelerator, model, config) if config.use_ema else None
    stream = text_stream(captions, labels, corpus, tokenizer, config, accelerator.process_index)
    loss_fn = partial(caption_loss, class_weight=config.class_weight)
    hooks = [ema_hook(ema, model)] if ema else []
    result = fit(accelerator, model, optimizer, lr_scheduler, stream, loss_fn, config, hooks)
    if accelerator.is_main_process and not result.signum:
        if ema:
            ema.copy_to(model.parameters())
        trained = accelerator.unwrap_model(model).mlm
        encoder = BertModel(trained.config)  # with a pooler, which plain `BertModel.from_pretrained` expects
        encoder.load_state_dict(trained.bert.state_dict(), strict=False)

        def write(folder: Path) -> None:
            encoder.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            write_results({**environment(), "config": asdict(config)}, folder / "training.json")

        hub.finish_training(save_folder(Path(config.output_dir, "text_encoder"), write), config, repo_id)
    accelerator.end_training()
    return result.signum


if __name__ == "__main__":
    run(main, parse(TextEncoderConfig, PRESETS))
