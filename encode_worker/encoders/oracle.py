"""OracleEncoder: embeddings without a tower, each a digest of its picture and key. No torch.

What it writes is what `reference_tokens` expects an `OracleExecutor` to read: a wrong, stale, foreign or swapped row
changes every token after it. It says nothing about speed (`paced`).
"""

import numpy as np

from engine.commands import EncodeItem, EncodeOutput, EncodePlan
from engine.executors.oracle import oracle_embedding
from engine.kv.arena import Arena


class OracleEncoder:
    """Implements `Encoder` over host memory."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def encode(self, plan: EncodePlan) -> EncodeOutput:
        for item in plan.items:
            self._write(item)
        return EncodeOutput(plan.step_id)

    def _write(self, item: EncodeItem) -> None:
        schema = self._arena.schema
        stream = schema.kv
        rows_TR = oracle_embedding(item.picture, item.key, item.features, schema)
        rows_TLHPX = rows_TR.reshape(item.features, stream.layers, stream.heads, stream.parts, -1)
        data_LHPTX = np.ascontiguousarray(rows_TLHPX.transpose(1, 2, 3, 0, 4))
        self._arena.write(item.block_table, (0, stream.layers), (0, item.features), None, data_LHPTX)
