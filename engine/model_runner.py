"""Runs a transformers model over a packed batch, with KV in the arena.

    slices -> packed tokens -> the model's own forward -> logits of the rows that somebody wants
                                 | layers [0, g) -> on_layers(0, g) -> layers [g, 2g) -> on_layers(g, 2g) -> ...

The model is called whole, so what families do differently (scaled embeddings, two kinds of rotary angles, experts, a
capped vocabulary projection) needs no code of ours. The two seams are the attention function, which finds the step in
the keyword `paged` (`engine.attention`), and hooks between layers, which exist only in steps that hold a prefill slice.
A chunk with images in it is embedded here first (`engine.image_inputs`): the model is then handed embeddings.

The runner decides nothing: which tokens, which columns and when is in the plan; tokens are picked by the sampler.
`verify` is how a model earns its place: it must give the logits of its own eager forward.

Legend: T packed tokens, E hidden size, N rows whose logits are kept, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from engine.attention import AttentionBackend, StepAttention, use_paged_attention
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_sdpa import PagedSdpa
from engine.base import limits
from engine.base.errors import Internal, InvalidArgument
from engine.commands import SequenceSlice, StepPlan
from engine.executors import LayersComputed
from engine.image_inputs import EmbeddingRows, Placeholders, placeholders_of, positions_of
from engine.kv.arena import Arena
from engine.models.info import experts_of, require_servable, window_of
from engine.types import SamplingParams

# Largest logit difference that counts as rounding, relative to the largest logit. Wrong attention is off by far more.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# The self-check's prompt: a window's worth of tokens and 41 more, cut into chunks, the last tokens one by one.
_VERIFY_FIRST_CHUNK = 18  # not a multiple of any block size: the second chunk starts inside a block
_VERIFY_LAST_CHUNKS = (3, 3)
_VERIFY_DECODES = 5
_VERIFY_TOKENS = 41


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step's model call leaves for the sampler, in the model's dtype."""

    sampled_NV: torch.Tensor  # the slices that sample, in plan order: one row each, however many choices they have
    scored_TV: dict[int, torch.Tensor]  # seq_id -> all fed rows, of prefill slices that want `prompt_logprobs`


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A plan's slices, one after the other without padding.

    packed rows   | slice 0 | slice 1 ........ | slice 2 ..... |
    kept rows     0         |  of those that sample: the last row of each, then all rows of those that are scored
    """

    tokens_1T: torch.Tensor
    positions: torch.Tensor  # [1, T], or [3, 1, T] (`image_inputs.positions_of`)
    placeholders: tuple[Placeholders, ...]
    spans: tuple[Span, ...]
    kept_rows_N: torch.Tensor
    num_sampled: int
    scored: dict[int, slice]  # seq_id -> its stretch of the kept rows

    @classmethod
    def pack(cls, slices: Sequence[SequenceSlice], device: torch.device) -> "PackedStep":
        spans = tuple(_spans(slices))
        pairs = list(zip(spans, slices, strict=True))
        kept = [span.row + span.tokens - 1 for span, piece in pairs if piece.sample_position is not None]
        num_sampled, scored = len(kept), {}
        for span, piece in pairs:
            if piece.is_prefill and piece.sampling.prompt_logprobs is not None:
                scored[piece.seq_id] = slice(len(kept), len(kept) + span.tokens)
                kept.extend(range(span.row, span.row + span.tokens))
        return cls(
            tokens_1T=_to_device([[token for piece in slices for token in piece.token_ids]], device),
            positions=torch.from_numpy(positions_of(slices, spans)).to(device, non_blocking=True),
            placeholders=tuple(each for span, piece in pairs for each in placeholders_of(piece, span)),
            spans=spans,
            kept_rows_N=_to_device(kept, device),
            num_sampled=num_sampled,
            scored=scored,
        )

    def split(self, logits_NV: torch.Tensor) -> StepLogits:
        scored_TV = {seq_id: logits_NV[rows] for seq_id, rows in self.scored.items()}
        return StepLogits(logits_NV[: self.num_sampled], scored_TV)


class ModelRunner:
    """One transformers model over one arena. The only thing that outlives a step is the arena's content."""

    def __init__(
        self,
        model: Any,
        arena: Arena,
        layers_per_group: int = limits.LAYERS_PER_GROUP,
        backend: AttentionBackend | None = None,
        embeddings: Arena | None = None,
    ) -> None:
        """`embeddings`: where images' rows are, for a model that sees."""
        require_servable(model.config.to_dict())
        self.model = model
        self.arena = arena
        self.kv = PagedKV(arena)
        self.backend = backend or PagedSdpa()
        self.layers_per_group = layers_per_group
        self.embeddings = embeddings
        self._image_rows = None if embeddings is None else EmbeddingRows(embeddings)
        self.layers = decoder_layers(model)
        use_paged_attention(model)

    def with_arena(self, arena: Arena) -> "ModelRunner":
        """The same model over other memory."""
        return ModelRunner(self.model, arena, self.layers_per_group, self.backend, self.embeddings)

    @torch.inference_mode()
    def run(self, plan: StepPlan, on_layers: LayersComputed) -> StepLogits:
        """Compute the plan.

        `on_layers` is told of each group of layers if the step holds a prefill slice. A pure decode step has no hooks
        between layers (DESIGN 6), so that it can become one captured graph.
        """
        step = PackedStep.pack(plan.slices, self.kv.device)
        paged = StepAttention.prepare(self.kv, self.backend, step.spans)
        with ExitStack() as hooks:
            if any(piece.is_prefill for piece in plan.slices):
                hooks.enter_context(self._announcing(on_layers))
            inputs = self._embedded(step) if step.placeholders else step.tokens_1T
            return step.split(self.forward(inputs, step.positions, step.kept_rows_N, paged))

    def forward(
        self, inputs: torch.Tensor, positions: torch.Tensor, kept_rows_N: torch.Tensor, paged: StepAttention
    ) -> torch.Tensor:
        """logits_NV of the kept rows: a function of tensors alone, which is what a graph captures.

        `inputs` are tokens, [1, T], or what they are embedded as, [1, T, E].
        """
        kind = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        output = self.model(
            **{kind: inputs}, position_ids=positions, use_cache=False, logits_to_keep=kept_rows_N, paged=paged
        )
        logits_NV: torch.Tensor = output.logits[0]
        return logits_NV

    def _embedded(self, step: PackedStep) -> torch.Tensor:
        if self._image_rows is None:
            raise Internal("a step with images needs embedding memory")
        embedded_1TE: torch.Tensor = self.model.get_input_embeddings()(step.tokens_1T)
        self._image_rows.put(embedded_1TE, step.placeholders)
        return embedded_1TE

    @contextmanager
    def _announcing(self, on_layers: LayersComputed) -> Iterator[None]:
        """For this step, say when a group's last layer is done: its KV, and that of the layers before it, is final."""
        bounds = [*range(0, len(self.layers), self.layers_per_group), len(self.layers)]
        with ExitStack() as hooks:
            for start, end in pairwise(bounds):
                hook = self.layers[end - 1].register_forward_hook(lambda *_, group=(start, end): on_layers(*group))
                hooks.callback(hook.remove)
            yield


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The model's list of decoder layers, found by its length and by the layers' own numbers, not by its name."""
    count = model.config.num_hidden_layers  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and all(map(_is_layer, module, range(count))):
            return list(module)
    raise InvalidArgument(
        f"model: {model.config.model_type} has no list of {count} decoder layers",  # type: ignore[union-attr]
        field="model",
    )


def _is_layer(module: nn.Module, index: int) -> bool:
    return any(getattr(part, "layer_idx", None) == index for part in module.modules())


def _spans(slices: Sequence[SequenceSlice]) -> Iterator[Span]:
    row = 0
    for piece in slices:
        yield Span(row, len(piece.token_ids), piece.start, piece.block_table)
        row += len(piece.token_ids)


def _to_device(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


# -- self-check --------------------------------------------------------------------------------------------------------
def verify(runner: ModelRunner, expected_NV: torch.Tensor | None = None) -> torch.Tensor:
    """Refuse a model whose logits under our runner are not those of its own eager forward; returns the latter.

    The prompt runs in chunks and decode steps, in memory of its own, and is longer than the model's window: Gemma-2
    and gpt-oss are silently wrong when their attention is misread. A long window is shortened meanwhile, in both
    forwards alike. Whoever changes the module's weights or layers afterwards (packing) calls this again with the
    logits of the first call.
    """
    model = runner.model
    try:
        with _window_at_most(model, limits.VERIFY_WINDOW_TOKENS_MAX), torch.inference_mode():
            tokens, cuts = _verify_prompt(model.config)
            if expected_NV is None:
                expected_NV = _eager_logits(model, tokens, [end - 1 for end in cuts[1:]])
            actual_NV = _paged_logits(runner, tokens, cuts)
    except InvalidArgument:
        raise
    except Exception as error:  # foreign modules raise what they like
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InvalidArgument(f"model: {model.config.model_type} does not run: {reason}", field="model") from error
    _require_equal(model, actual_NV, expected_NV)
    return expected_NV


def _require_equal(model: Any, actual_NV: torch.Tensor, expected_NV: torch.Tensor) -> None:
    difference_N = (actual_NV - expected_NV).abs().amax(dim=-1) / expected_NV.abs().max()
    chunks_N, decodes_N = difference_N[:-_VERIFY_DECODES], difference_N[-_VERIFY_DECODES:]
    # Rounding moves a token to another expert where two are nearly tied, and then it is far off, rightly. That befalls
    # few tokens; what we get wrong befalls all chunks or all decodes. Hence the median, where routing can flip.
    routing_flips = model.dtype != torch.float32 and experts_of(model.config.to_dict()) > 0
    worst = [float(part_N.median() if routing_flips else part_N.max()) for part_N in (chunks_N, decodes_N)]
    tolerance = _TOLERANCE[model.dtype]
    if not all(difference <= tolerance for difference in worst):  # NaN fails too
        raise InvalidArgument(
            f"model: {model.config.model_type} differs from its own eager forward: largest logit difference is "
            f"{max(worst):.1e} of the largest logit, {tolerance:.0e} is allowed",
            field="model",
        )


def _verify_prompt(config: Any) -> tuple[list[int], list[int]]:
    """(tokens, where they are cut)."""
    length = (window_of(config.to_dict()) or 0) + _VERIFY_TOKENS
    tail = [*_VERIFY_LAST_CHUNKS, *[1] * _VERIFY_DECODES]
    second_chunk = length - _VERIFY_FIRST_CHUNK - sum(tail)
    cuts = list(accumulate([_VERIFY_FIRST_CHUNK, second_chunk, *tail], initial=0))
    return [(7919 * position + 13) % config.vocab_size for position in range(length)], cuts


def _eager_logits(model: Any, tokens: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
    inputs = torch.tensor([tokens], device=model.device)
    keep = torch.tensor(rows, device=model.device)
    with _setting(model.config, "_attn_implementation", "eager"):
        logits_NV: torch.Tensor = model(inputs, use_cache=False, logits_to_keep=keep).logits[0]
    return logits_NV.float()


def _paged_logits(runner: ModelRunner, tokens: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    columns = -(-len(tokens) // runner.arena.block_size)
    scratch = runner.with_arena(_arena_beside(runner, columns))
    table = tuple(reversed(range(columns)))  # not the identity: a runner that ignores tables must fail
    rows = []
    for start, end in pairwise(cuts):
        piece = SequenceSlice(0, tuple(tokens[start:end]), start, table, SamplingParams(), 0, is_prefill=False)
        rows.append(scratch.run(StepPlan(0, (piece,)), lambda start, end: None).sampled_NV[0])
    return torch.stack(rows).float()


def _arena_beside(runner: ModelRunner, columns: int) -> Arena:
    """Memory like the runner's own, on the same device."""
    schema, block_size, device = runner.arena.schema, runner.arena.block_size, runner.kv.device
    if device.type == "cpu":
        return Arena(schema, columns=columns, block_size=block_size)
    from engine.kv.device_arena import DeviceArena

    return DeviceArena(schema, columns=columns, block_size=block_size, device=device)


@contextmanager
def _window_at_most(model: nn.Module, tokens_max: int) -> Iterator[None]:
    """Shorten the window of a model, which is in its configuration (masks) and often also in its layers (keywords)."""
    with ExitStack() as settings:
        for owner in (model.config, *model.modules()):
            window = getattr(owner, "sliding_window", None)
            if isinstance(window, int) and window > tokens_max:
                settings.enter_context(_setting(owner, "sliding_window", tokens_max))
        yield


@contextmanager
def _setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
