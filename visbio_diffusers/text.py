"""Captions as tensors: encoding with any BERT, and a cache on disk, since captions repeat and it stays frozen."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from visbio_diffusers.files import whole_file


PART = 16_384  # captions of one file of embeddings


def max_tokens(tokenizer, text_encoder) -> int:
    """Return how many tokens of a text, special ones included, the encoder takes."""
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


def check_texts(name, texts, allow_empty=False):
    """Raise a ValueError unless `texts` is a text or a non-empty list of texts that say something."""
    if not isinstance(texts, (str, list)) or not all(isinstance(text, str) for text in texts):
        kind = type(texts).__name__
        if isinstance(texts, list):
            kind = f"a list with {next(type(text).__name__ for text in texts if not isinstance(text, str))}"
        raise ValueError(f"`{name}` must be a text or a list of texts, but is {kind}")
    texts = [texts] if isinstance(texts, str) else texts
    if not texts:
        raise ValueError(f"`{name}` is an empty list: give at least one text")
    if not allow_empty and not all(text.strip() for text in texts):
        raise ValueError(
            f"`{name}` is empty: describe the image, or draw without text by prompt_embeds=pipe.encode_prompt('')[0]"
        )


@torch.no_grad()
def encode_text(text_encoder, tokenizer, texts: Sequence[str], device=None) -> torch.Tensor:
    """Return the last hidden states of `texts`, with rows of zeros as padding.

    Args:
        text_encoder (`transformers.BertModel`): or any encoder that returns `last_hidden_state`.
        tokenizer (`transformers.PreTrainedTokenizerBase`): the encoder's own.
        texts (`Sequence[str]`): longer ones are cut to what the encoder takes.
        device (`torch.device`, *optional*): where the encoder runs; by default where it is.

    Returns:
        `torch.Tensor` of shape `(len(texts), tokens, hidden_size)` in the encoder's dtype; `tokens` is that of the
        longest text. A row of zeros is padding (`text_mask` finds it).
    """
    inputs = tokenizer(
        list(texts),
        padding="longest",
        truncation=True,
        max_length=max_tokens(tokenizer, text_encoder),
        return_tensors="pt",
    )
    inputs = {name: inputs[name].to(device or text_encoder.device) for name in ("input_ids", "attention_mask")}
    hidden_states = text_encoder(**inputs).last_hidden_state
    return hidden_states * inputs["attention_mask"].unsqueeze(-1).to(hidden_states.dtype)


def text_mask(prompt_embeds: torch.Tensor) -> torch.Tensor:
    """Return a bool mask (batch, tokens) of `prompt_embeds` (batch, tokens, width): False where a row is all zeros."""
    return (prompt_embeds != 0).any(dim=-1)


class EmbeddingCache:
    """Hidden states of a fixed set of captions, each encoded once and kept in files of 16,384 captions.

    The files' names have a hash of encoder weights, captions and their tokens, so that they can never be stale; they
    are read memory-mapped, and hold fp16. Several processes with the same arguments share the work out.

    Args:
        captions (`Sequence[str]`): the distinct captions; looked up by their text.
        text_encoder, tokenizer: see `encode_text`; used only for files that do not exist yet.
        folder (`str` or `Path`): where the files are kept.
        batch_size (`int`): captions per forward pass of the encoder.
        rank, world_size (`int`): this process, and how many there are.
        wait (`Callable`): returns when all processes have called it.
    """

    def __init__(
        self,
        captions: Sequence[str],
        text_encoder,
        tokenizer,
        folder: str | Path,
        batch_size: int = 256,
        rank: int = 0,
        world_size: int = 1,
        wait: Callable[[], None] = lambda: None,
    ):
        order = sorted(range(len(captions)), key=lambda row: len(captions[row]))  # neighbours of like length
        ordered = [captions[row] for row in order]
        self.row = {caption: row for row, caption in enumerate(ordered)}
        if len(self.row) != len(captions):
            raise ValueError("the captions of an EmbeddingCache must be distinct")
        self.part_size = max(1, PART // batch_size) * batch_size
        stem = f"embeddings-{_fingerprint(captions, text_encoder, tokenizer)}-{self.part_size}"
        parts = range(-(-len(ordered) // self.part_size))
        self.paths = [Path(folder, f"{stem}-{part:05d}.safetensors") for part in parts]
        for part in parts[rank::world_size]:
            if not self.paths[part].exists():
                texts = ordered[part * self.part_size : (part + 1) * self.part_size]
                self._write(self.paths[part], texts, text_encoder, tokenizer, batch_size)
        wait()
        files = [safe_open(path, framework="pt") for path in self.paths]
        self._tokens = [file.get_slice("tokens") for file in files]
        self._starts = [file.get_tensor("starts").tolist() for file in files]

    @staticmethod
    def _write(path, captions, text_encoder, tokenizer, batch_size):
        states = []
        for start in tqdm(range(0, len(captions), batch_size), desc="encoding captions", unit="batch"):
            hidden_states = encode_text(text_encoder, tokenizer, captions[start : start + batch_size])
            states += [state[mask].half().cpu() for state, mask in zip(hidden_states, text_mask(hidden_states))]
        starts = torch.tensor([0, *(len(state) for state in states)]).cumsum(0)
        with whole_file(path) as temporary:
            save_file({"tokens": torch.cat(states), "starts": starts}, temporary)

    def __call__(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 hidden states (batch, tokens, width), padded with zeros, and their bool mask.

        Raises:
            KeyError: for a caption that was not among those given at the start.
        """
        states = [self._state(self.row[caption]) for caption in captions]
        mask = pad_sequence([torch.ones(len(state), dtype=torch.bool) for state in states], batch_first=True)
        return pad_sequence(states, batch_first=True).float(), mask

    @property
    def nbytes(self) -> int:
        """Size of all hidden states."""
        return sum(2 * tokens.get_shape()[0] * tokens.get_shape()[1] for tokens in self._tokens)

    def resident(self, device: torch.device) -> "ResidentEmbeddings":
        """Return all hidden states on a device."""
        lengths = [end - start for starts in self._starts for start, end in zip(starts, starts[1:])]
        tokens = torch.cat([tokens[:] for tokens in self._tokens])
        return ResidentEmbeddings(self.row, tokens.to(device), torch.tensor(lengths, device=device))

    def _state(self, row: int) -> torch.Tensor:
        part, index = divmod(row, self.part_size)
        return self._tokens[part][self._starts[part][index] : self._starts[part][index + 1]]


class ResidentEmbeddings:
    """The hidden states of an `EmbeddingCache` on one device, picked there; every batch has the same shape.

    Args:
        row (`dict[str, int]`): the number of each caption.
        tokens (`torch.Tensor` of shape `(tokens, width)`): of all captions, one after the other.
        lengths (`torch.Tensor` of shape `(captions,)`): how many tokens each has.
    """

    def __init__(self, row: dict[str, int], tokens: torch.Tensor, lengths: torch.Tensor):
        self.row, self.tokens, self.lengths = row, tokens, lengths
        self.starts = lengths.cumsum(0) - lengths
        longest = -(-int(lengths.max()) // 8) * 8  # which attention kernels like
        self.places = torch.arange(longest, device=tokens.device)

    def rows(self, captions: Sequence[str]) -> torch.Tensor:
        """Return the numbers of captions, int64 `(batch,)` on the CPU."""
        return torch.tensor([self.row[caption] for caption in captions])

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 hidden states `(batch, tokens, width)` of numbered captions, and their bool mask."""
        mask = self.places < self.lengths[rows, None]
        places = (self.starts[rows, None] + self.places).clamp(max=len(self.tokens) - 1)
        return self.tokens[places].float() * mask[..., None], mask


def _fingerprint(captions, text_encoder, tokenizer) -> str:
    tokens = tokenizer(list(captions), truncation=True, max_length=max_tokens(tokenizer, text_encoder))["input_ids"]
    digest = hashlib.sha256(json.dumps([list(captions), tokens]).encode())
    for name, tensor in sorted(text_encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
