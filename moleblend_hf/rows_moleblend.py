# Copyright 2026 The moleblend_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Computing only where something is read: selected rows of padded tensors, means over them, and what drops them at random."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .blending_moleblend import IGNORED_LABEL

# Attention scores of a group of molecules: 1 MB in float32. Larger groups run out of the cache, smaller ones cost more calls.
MAX_SCORES_IN_GROUP = 2**18


class RowSelection:
    """The positions of a mask at which something is computed: `take` gathers them into rows, `put` puts rows back.

    Padding is 40% of the tokens and 60% of the pairs of a batch of drug-like molecules, and blending hides relations of most
    pairs; computing only what is read is the same function, cheaper. With `gather=False` every position is a row (shapes do
    not depend on the data: for compilation, export and devices that would have to wait for the count) and `put` blanks the
    positions that are not selected, so that both ways return the same.

    Args:
        mask (`torch.BoolTensor`): positions to select.
        gather (`bool`): whether to gather the selected positions.
    """

    def __init__(self, mask: torch.Tensor, gather: bool):
        self.shape = mask.shape
        self.mask = mask
        self.indices = mask.flatten().nonzero().squeeze(1) if gather else None

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """`(*mask.shape, ...)` to `(rows, ...)`."""
        rows = values.flatten(0, self.mask.dim() - 1)
        return rows if self.indices is None else rows.index_select(0, self.indices)

    def put(self, rows: torch.Tensor) -> torch.Tensor:
        """`(rows, ...)` to `(*mask.shape, ...)`, zero where nothing is selected."""
        if self.indices is None:
            values = rows.unflatten(0, self.shape)
            return values.masked_fill(~self.mask.view(*self.shape, *(1,) * (rows.dim() - 1)), 0)
        values = rows.new_zeros(self.mask.numel(), *rows.shape[1:]).index_copy_(0, self.indices, rows)
        return values.unflatten(0, self.shape)

    def sum_last(self, rows: torch.Tensor) -> torch.Tensor:
        """`put(rows)` summed over the last dimension of the mask, without building it: `(*mask.shape[:-1], ...)`."""
        if self.indices is None:
            return self.put(rows).sum(self.mask.dim() - 1)
        *outer, last = self.shape
        sums = rows.new_zeros(self.mask.numel() // last, *rows.shape[1:])
        return sums.index_add_(0, self.indices // last, rows).unflatten(0, outer)


class TokenSelection(RowSelection):
    """The real tokens of a batch, and groups of molecules of like size, for attention without the padding of the largest.

    The rows of a group follow one another, so that `split` and `join` cost little. A group's attention scores are few enough
    to stay in a processor's cache. Not `grouped`, all molecules are one group, as they are.

    Args:
        mask (`torch.BoolTensor` of shape `(B, L)`): real tokens.
        num_heads (`int`): attention heads.
        gather (`bool`): whether to gather the rows.
        grouped (`bool`): whether to make groups; needs `gather`.
    """

    def __init__(self, mask: torch.Tensor, num_heads: int, gather: bool, grouped: bool):
        super().__init__(mask, gather)
        self.order = None
        self.groups: list[RowSelection] = [self]
        if not grouped or len(mask) < 2:
            return
        num_tokens = mask.shape[1]
        lengths, self.order = (mask * torch.arange(1, num_tokens + 1, device=mask.device)).amax(1).sort(stable=True)
        sizes: list[int] = []
        for length in lengths.tolist():
            if sizes and (sizes[-1] + 1) * length**2 * num_heads <= MAX_SCORES_IN_GROUP:
                sizes[-1] += 1
            else:
                sizes.append(1)
        mask = mask[self.order]
        self.indices = (self.order.unsqueeze(1) * num_tokens + torch.arange(num_tokens, device=mask.device))[mask]
        masks = mask.split(sizes)
        self.num_rows = [int(molecules.sum()) for molecules in masks]
        self.groups = [
            RowSelection(molecules[:, : int(longest[-1])], gather)
            for molecules, longest in zip(masks, lengths.split(sizes), strict=True)
        ]

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(rows, ...)` to the rows of each group."""
        return (rows,) if self.order is None else rows.split(self.num_rows)

    def join(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows of each group to `(rows, ...)`."""
        return torch.cat(list(rows)) if len(rows) > 1 else rows[0]

    def split_pairs(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(B, H, L, L)` to `(molecules, H, length, length)` of each group."""
        if self.order is None:
            return (values,)
        molecules = values.index_select(0, self.order).split([group.shape[0] for group in self.groups])
        lengths = [group.shape[1] for group in self.groups]
        return tuple(part[..., :length, :length].contiguous() for part, length in zip(molecules, lengths, strict=True))


def gathers(tensor: torch.Tensor) -> bool:
    """Whether `RowSelection` should gather: counting rows is free on CPU, a synchronisation elsewhere, a graph break compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def widen(values: torch.Tensor) -> torch.Tensor:
    """On CPU at least in float32, contiguous: to arrange the small matrices of a head in bfloat16 takes longer than float32
    takes for all of it."""
    if not gathers(values):
        return values
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.to(dtype, memory_format=torch.contiguous_format)


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of `values` where `mask` is true, and how many those are."""
    return values.masked_fill(~mask, 0).sum(), mask.sum()


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Mean of `values` where `mask` is true; 0 with zero gradient where nothing is."""
    return values.masked_fill(~mask, 0).sum(dim) / mask.sum(dim).clamp(min=1)


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, gather: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of `logits (..., C)`, in fp32, summed over the labels that are not -100, and how many those are."""
    rows = RowSelection(labels != IGNORED_LABEL, gather)
    losses = F.cross_entropy(rows.take(logits).float(), rows.take(labels), ignore_index=IGNORED_LABEL, reduction="sum")
    return losses, rows.mask.sum()


def drop_values(values: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """`F.dropout` with cheaper random numbers on CPU, where drawing them costs more than the rest of a layer's pointwise work.

    One 64-bit draw decides on four values (16 bits each, so that the rate is exact to 1 / 65536, and the scale exact to the
    rate that is used).
    """
    if not training or rate == 0 or not gathers(values):
        return F.dropout(values, rate, training)
    threshold = min(round(rate * 2**16), 2**16 - 1)
    draws = torch.empty((values.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = (draws[: values.numel()] >= threshold - 2**15).view(values.shape)
    # In the dtype of the values: a product with booleans converts them first, forward and backward.
    return values * kept.to(values.dtype).mul_(2**16 / (2**16 - threshold))


def drop_path(hidden_states: torch.Tensor, rate: float, tokens: RowSelection) -> torch.Tensor:
    """Stochastic depth: zeroes the branch of whole molecules and scales the others up. `hidden_states` is `(rows, D)`."""
    kept = torch.rand(tokens.shape[0], 1, device=hidden_states.device) >= rate
    scale = kept.to(hidden_states.dtype) / (1 - rate)
    return hidden_states * tokens.take(scale.expand(tokens.shape)).unsqueeze(-1)
