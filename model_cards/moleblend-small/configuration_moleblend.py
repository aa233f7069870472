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
"""MoleBLEND model configuration."""

import math
from dataclasses import fields
from typing import Any, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import auto_docstring, logging

logger = logging.get_logger(__name__)

TARGET_TRANSFORMS = ("none", "log10", "signed_log10")
# What the processor packs into `path_bond_types`: bond types, stereo values and conjugation values; bonds of a path.
BOND_VOCABULARY_SIZES = (5, 6, 2)
MAX_PATH_BONDS = 8
# Rows for padding, 0 to 509 bonds, and what the processor writes for unreachable.
MAX_SHORTEST_PATH_DISTANCES = 512
# What describes one target each, and says nothing about others.
PER_TARGET = (
    "target_means", "target_scales", "target_units", "target_transforms", "target_class_names", "conformal_quantiles",
)  # fmt: skip
PROCESSORS = {
    "AutoProcessor": "processing_moleblend.MoleBlendProcessor",
    "AutoFeatureExtractor": "processing_moleblend.MoleBlendProcessor",
}


@auto_docstring(checkpoint="moleblend-base")
@strict
class MoleBlendConfig(PreTrainedConfig):
    r"""
    hidden_size (`int`, *optional*, defaults to 768):
        Width of the atom and graph-token states.
    intermediate_size (`int`, *optional*, defaults to 768):
        Width of the feed-forward layers.
    num_hidden_layers (`int`, *optional*, defaults to 12):
        Number of encoder layers.
    num_attention_heads (`int`, *optional*, defaults to 32):
        Number of attention heads; must divide `hidden_size`.
    hidden_act (`str`, *optional*, defaults to `"gelu"`):
        Activation of the feed-forward layers, the pair heads and the property head.
    hidden_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the embeddings and on the output of each attention and feed-forward block.
    attention_dropout (`float`, *optional*, defaults to 0.1):
        Dropout on attention probabilities (also those of the denoising head).
    activation_dropout (`float`, *optional*, defaults to 0.1):
        Dropout after the activation of the feed-forward layers.
    drop_path_rate (`float`, *optional*, defaults to 0.1):
        Stochastic depth of the last layer; grows linearly from 0 at the first layer.
    layer_norm_eps (`float`, *optional*, defaults to 1e-05):
        Epsilon of the encoder's layer norms.
    initializer_range (`float`, *optional*, defaults to 0.02):
        Standard deviation of the normal initialisation.
    gaussian_initialization (`str`, *optional*, defaults to `"uniform"`):
        How the Gaussian kernels start: `"uniform"` (means and widths uniform in 0..3, pair factors 1, pair offsets 0; what
        the original's code states) or `"normal"` (everything N(0, `initializer_range`); what it ends up with, because a
        later pass overwrites those values).
    atom_vocabulary_sizes (`list[int]`, *optional*, defaults to `(119, 5, 12, 12, 10, 6, 6, 2, 2)`):
        Number of values of each atom feature, in the order of `atom_features` (OGB 1.3.6). The first is the atomic number.
    bond_vocabulary_sizes (`list[int]`, *optional*, defaults to `(5, 6, 2)`):
        Number of bond types, bond stereo values and conjugation values (OGB 1.3.6). There are no others: the processor packs
        the three into one index.
    num_degrees (`int`, *optional*, defaults to 64):
        Rows of the degree table; a higher degree takes the last row.
    num_shortest_path_distances (`int`, *optional*, defaults to 512):
        Rows of the shortest-path table: padding, 0 to `num_shortest_path_distances - 3` bonds, unreachable.
    max_path_bonds (`int`, *optional*, defaults to 5):
        Number of bonds of a shortest path that the bond-path relation holds (`P`), at most 8.
    num_distance_kernels (`int`, *optional*, defaults to 128):
        Number of Gaussian kernels of a distance (`K`).
    distance_feature_scale (`float`, *optional*, defaults to 0.01):
        Weight of an atom's summed distance features in its embedding.
    blend_probabilities (`list[float]`, *optional*, defaults to `(0.2, 0.2, 0.6)`):
        Probability that pretraining shows a pair's shortest-path distance, bond path, or distance.
    atom_blend_probabilities (`list[float]`, *optional*, defaults to `(0.4, 0.6)`):
        Probability that pretraining shows an atom's degree, or its distance feature.
    blend_per_molecule (`bool`, *optional*, defaults to `True`):
        Whether each molecule has its own draw of pair modalities. `False` shares one matrix over the batch, as the
        original does.
    noise_std (`float`, *optional*, defaults to 0.2):
        Standard deviation of the coordinate noise in pretraining, in angstrom.
    pair_head_size (`int`, *optional*, defaults to 32):
        Width of the two projections whose outer product a pair head reads.
    num_shortest_path_classes (`int`, *optional*, defaults to 11):
        Classes of the shortest-path head: 1, 2, ... bonds; the last one means that many or more.
    bond_class_sizes (`list[int]`, *optional*, defaults to `(4, 3, 2)`):
        Bond types, stereo values and conjugation values that the bond-path head tells apart; other bonds are no target.
    relative_position_hidden_size (`int`, *optional*, defaults to 256):
        Width between the two linear maps of the relative-position head.
    relative_position_target (`str`, *optional*, defaults to `"direction"`):
        What the relative-position head predicts: `"direction"` (cosine loss against the vector between two atoms, as in
        the paper) or `"distance"` (smooth L1 against their distance in angstrom, independent of the frame).
    loss_weights (`list[float]`, *optional*, defaults to `(0.1, 0.1, 0.5, 6.0)`):
        Weights of the shortest-path, bond-path, relative-position and coordinate-denoising losses in `loss`.
    readout (`str`, *optional*, defaults to `"graph_token"`):
        What the property head reads: `"graph_token"`, or every atom with the outputs pooled by `"mean"` or `"sum"`.
    use_weighted_layer_sum (`bool`, *optional*, defaults to `False`):
        Whether the property head reads a mean of the states of all layers, with learned weights, in place of the last
        layer's: what pretraining asks for has turned the last layers away from some properties (RESULTS.md).
    classifier_dropout (`float`, *optional*, defaults to 0.0):
        Dropout in the property head.
    target_transforms (`list[str]`, *optional*):
        Transform of each regression target before it is standardised: `"none"`, `"log10"` or `"signed_log10"`
        (`sign(y) * log10(1 + abs(y))`). Labels and outputs are in the targets' own units all the same.
    target_means (`list[float]`, *optional*):
        Mean of each regression target after its transform. Outputs are `target_means + target_scales * head output`, with
        the transform undone.
    target_scales (`list[float]`, *optional*):
        Standard deviation of each regression target after its transform; the loss is taken in these units.
    target_units (`list[str]`, *optional*):
        Unit of each target, for people; the names of the targets are `id2label`.
    target_class_names (`list[list[str]]`, *optional*):
        What 0 and 1 mean for each binary task, for people and for labels that say it in words; `None` for a target of which
        nobody said so. The names of the classes of one target are `id2label`.
    conformal_coverage (`float`, *optional*):
        Share of new molecules, alike to those of the calibration, whose true value the conformal intervals or sets hold.
    conformal_quantiles (`list[float]`, *optional*):
        What conformal calibration found for each target; `None` for a target that was not calibrated. Regression: half the
        width of the interval, after the target's transform. Binary tasks: the largest `1 - probability` of a class in the
        prediction set. Classes: the same, one entry.

    A checkpoint is fine-tuned to other targets with `from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)`:
    what the folder says about its own targets (names, means, scales, units, transforms, conformal quantiles) is left
    behind, with a warning, where another number of labels is asked for; all of them can be given in the same call.

    Example:

    ```python
    >>> from moleblend_hf import MoleBlendConfig, MoleBlendModel

    >>> configuration = MoleBlendConfig()
    >>> model = MoleBlendModel(configuration)
    >>> configuration = model.config
    ```
    """

    model_type = "moleblend"
    # `save_pretrained` writes the entry of the saved class only; every folder carries the whole map instead, so that each
    # auto class loads from it.
    auto_classes = {
        "AutoConfig": "configuration_moleblend.MoleBlendConfig",
        "AutoModel": "modeling_moleblend.MoleBlendModel",
        "AutoModelForPreTraining": "modeling_moleblend.MoleBlendForPreTraining",
        "AutoModelForSequenceClassification": "modeling_moleblend.MoleBlendForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_moleblend.MoleBlendForTokenClassification",
        **PROCESSORS,
    }

    hidden_size: int = 768
    intermediate_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 32
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    gaussian_initialization: Literal["uniform", "normal"] = "uniform"

    atom_vocabulary_sizes: list[int] | tuple[int, ...] = (119, 5, 12, 12, 10, 6, 6, 2, 2)
    bond_vocabulary_sizes: list[int] | tuple[int, ...] = BOND_VOCABULARY_SIZES
    num_degrees: int = 64
    num_shortest_path_distances: int = 512
    max_path_bonds: int = 5
    num_distance_kernels: int = 128
    distance_feature_scale: float | int = 0.01

    blend_probabilities: list[float | int] | tuple[float | int, ...] = (0.2, 0.2, 0.6)
    atom_blend_probabilities: list[float | int] | tuple[float | int, ...] = (0.4, 0.6)
    blend_per_molecule: bool = True
    noise_std: float | int = 0.2
    pair_head_size: int = 32
    num_shortest_path_classes: int = 11
    bond_class_sizes: list[int] | tuple[int, ...] = (4, 3, 2)
    relative_position_hidden_size: int = 256
    relative_position_target: Literal["direction", "distance"] = "direction"
    loss_weights: list[float | int] | tuple[float | int, ...] = (0.1, 0.1, 0.5, 6.0)

    readout: Literal["graph_token", "mean", "sum"] = "graph_token"
    use_weighted_layer_sum: bool = False
    classifier_dropout: float | int = 0.0
    target_transforms: list[str] | tuple[str, ...] | None = None
    target_means: list[float | int] | tuple[float | int, ...] | None = None
    target_scales: list[float | int] | tuple[float | int, ...] | None = None
    target_units: list[str] | tuple[str, ...] | None = None
    target_class_names: (
        list[list[str] | tuple[str, ...] | None] | tuple[list[str] | tuple[str, ...] | None, ...] | None
    ) = None
    conformal_coverage: float | None = None
    conformal_quantiles: list[float | int | None] | tuple[float | int | None, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # JSON has no tuples: a saved and reloaded config compares equal to the one that was saved.
        for name, value in vars(self).items():
            if isinstance(value, tuple):
                setattr(self, name, list(value))
        # A map that is already there (a repository on the Hub) wins.
        kwargs.setdefault("auto_map", dict(self.auto_classes))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As in transformers, but what is overridden is validated together with the rest, as one config."""
        overrides = {
            field.name: kwargs.pop(field.name) for field in fields(cls) if field.name in kwargs.keys() - {"dtype"}
        }
        # Without names, a saved config has transformers' two labels.
        num_saved = len(config_dict.get("id2label") or (0, 1))
        num_labels = kwargs.get("num_labels")
        if num_labels is None:
            num_labels = len(overrides.get("id2label") or ()) or num_saved
        left_behind: list[str] = []
        if num_labels != num_saved:
            about_targets = ("id2label", "label2id", "conformal_coverage", *PER_TARGET)
            left_behind = [
                name for name in about_targets if config_dict.get(name) is not None and name not in overrides
            ]
        if left_behind:
            logger.warning(
                f"The checkpoint has {num_saved} targets and is asked for {num_labels}, so what it says about its own is left "
                f"behind: {', '.join(left_behind)}. Pass those that describe the new targets."
            )
        kept = {name: value for name, value in config_dict.items() if name not in left_behind}
        return super().from_dict({**kept, **overrides}, **kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: raises `ValueError` for values that make no sense, with the remedy."""
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_degrees",
            "max_path_bonds",
            "num_distance_kernels",
            "pair_head_size",
            "relative_position_hidden_size",
            "num_labels",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; set it to 1 or more.")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}); choose a number of heads that divides it."
            )
        for name in (
            "hidden_dropout",
            "attention_dropout",
            "activation_dropout",
            "drop_path_rate",
            "classifier_dropout",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; set it to a probability in [0, 1).")
        for name in ("layer_norm_eps", "initializer_range", "noise_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; set it to a finite number of 0 or more.")
        if not math.isfinite(self.distance_feature_scale):
            raise ValueError(
                f"`distance_feature_scale` is {self.distance_feature_scale}; set it to a finite number (0 leaves the feature out)."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f'`hidden_act` is "{self.hidden_act}"; there are {", ".join(ACT2FN)}.')
        if self.max_path_bonds > MAX_PATH_BONDS:
            raise ValueError(
                f"`max_path_bonds` is {self.max_path_bonds}; set it to {MAX_PATH_BONDS} or less, what the processor can give."
            )
        if not 4 <= self.num_shortest_path_distances <= MAX_SHORTEST_PATH_DISTANCES:
            raise ValueError(
                f"`num_shortest_path_distances` is {self.num_shortest_path_distances}; the table needs at least 4 rows "
                f"(padding, 0 bonds, 1 bond, unreachable) and has at most {MAX_SHORTEST_PATH_DISTANCES}: the processor writes "
                f"{MAX_SHORTEST_PATH_DISTANCES - 2} for unreachable, the last row."
            )
        if self.num_shortest_path_classes < 2:
            raise ValueError(
                f"`num_shortest_path_classes` is {self.num_shortest_path_classes}; set it to 2 or more (1 bond, more bonds)."
            )
        for name, length in (("atom_vocabulary_sizes", None), ("bond_class_sizes", 3)):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1 or length not in (None, len(sizes)):
                expected = "one positive size a feature" if length is None else f"{length} positive sizes"
                raise ValueError(f"`{name}` is {list(sizes)}; give {expected}.")
        if tuple(self.bond_vocabulary_sizes) != BOND_VOCABULARY_SIZES:
            raise ValueError(
                f"`bond_vocabulary_sizes` is {list(self.bond_vocabulary_sizes)}; give {list(BOND_VOCABULARY_SIZES)}, by which the "
                "processor packs the features of a bond into one index."
            )
        if any(c > v for c, v in zip(self.bond_class_sizes, self.bond_vocabulary_sizes, strict=True)):
            raise ValueError(
                f"`bond_class_sizes` {list(self.bond_class_sizes)} exceeds `bond_vocabulary_sizes` "
                f"{list(self.bond_vocabulary_sizes)}: a class without a value to predict; lower it."
            )
        for name, length in (("blend_probabilities", 3), ("atom_blend_probabilities", 2)):
            values = getattr(self, name)
            if len(values) != length or min(values) < 0 or not math.isclose(sum(values), 1.0, abs_tol=1e-6):
                raise ValueError(f"`{name}` is {list(values)}; give {length} probabilities that add up to 1.")
        if len(self.loss_weights) != 4 or not all(0 <= weight < math.inf for weight in self.loss_weights):
            raise ValueError(
                f"`loss_weights` is {list(self.loss_weights)}; give 4 finite weights of 0 or more "
                "(shortest path, bond path, relative position, denoising)."
            )
        if (self.target_means is None) != (self.target_scales is None):
            raise ValueError("`target_means` and `target_scales` belong together; give both or neither.")
        if (self.conformal_coverage is None) != (self.conformal_quantiles is None):
            raise ValueError("`conformal_coverage` and `conformal_quantiles` belong together; give both or neither.")
        one_a_target = dict.fromkeys(PER_TARGET, self.num_labels)
        if self.problem_type == "single_label_classification":
            one_a_target["conformal_quantiles"] = 1
        for name, length in one_a_target.items():
            values = getattr(self, name)
            if values is not None and len(values) != length:
                raise ValueError(
                    f"`{name}` has {len(values)} entries for {self.num_labels} labels; give {length}, or drop it with None."
                )
        for name in ("target_transforms", "target_means"):
            if getattr(self, name) is not None and self.problem_type not in (None, "regression"):
                raise ValueError(
                    f'`{name}` is for regression targets, but `problem_type` is "{self.problem_type}"; '
                    'drop it or set `problem_type="regression"`.'
                )
        if self.target_class_names is not None and self.problem_type not in (None, "multi_label_classification"):
            raise ValueError(
                f'`target_class_names` is for binary tasks, but `problem_type` is "{self.problem_type}"; drop it, or set '
                '`problem_type="multi_label_classification"`.'
            )
        for pair in self.target_class_names or ():
            if pair is not None and (len(pair) != 2 or pair[0] == pair[1]):
                raise ValueError(
                    f"`target_class_names` has {list(pair)}; give the two names of 0 and 1, or None, for each target."
                )
        for transform in self.target_transforms or ():
            if transform not in TARGET_TRANSFORMS:
                raise ValueError(
                    f'`target_transforms` has "{transform}"; there are {", ".join(TARGET_TRANSFORMS)}, one a target.'
                )
        if not all(math.isfinite(mean) for mean in self.target_means or ()):
            raise ValueError(f"`target_means` is {self.target_means}; each must be finite.")
        if not all(0 < scale < math.inf for scale in self.target_scales or ()):
            raise ValueError(f"`target_scales` is {self.target_scales}; each must be positive and finite.")
        if self.conformal_coverage is not None and not 0 < self.conformal_coverage < 1:
            raise ValueError(
                f"`conformal_coverage` is {self.conformal_coverage}; give a share between 0 and 1, say 0.9."
            )
        for quantile in self.conformal_quantiles or ():
            if quantile is not None and not 0 <= quantile < math.inf:
                raise ValueError(
                    f"`conformal_quantiles` has {quantile}; each must be a finite number of 0 or more, or None where a "
                    "target was not calibrated."
                )


# It would ask for the docstrings of all inherited fields here, too.  # trf-ignore: TRF057
@strict
class MoleBlendEnsembleConfig(MoleBlendConfig):
    r"""
    Configuration of [`MoleBlendEnsembleForSequenceClassification`]: that of its members, and how many they are.

    Args:
        num_members (`int`, *optional*, defaults to 1):
            Number of models in the ensemble. All else is shared by them: architecture, targets, scales.

    Example:

    ```python
    >>> from moleblend_hf import MoleBlendEnsembleConfig, MoleBlendEnsembleForSequenceClassification

    >>> configuration = MoleBlendEnsembleConfig(num_members=3, problem_type="regression", num_labels=1)
    >>> model = MoleBlendEnsembleForSequenceClassification(configuration)
    ```
    """

    model_type = "moleblend_ensemble"
    # Transformers' Trainer joins what the batches return along the first dimension, which are the members here.
    keys_to_ignore_at_inference = ["member_logits", "hidden_states", "attentions"]
    auto_classes = {
        "AutoConfig": "configuration_moleblend.MoleBlendEnsembleConfig",
        "AutoModelForSequenceClassification": (
            "modeling_moleblend_ensemble.MoleBlendEnsembleForSequenceClassification"
        ),
        **PROCESSORS,
    }

    num_members: int = 1

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: as of a single model, and the number of members."""
        super().validate_architecture()
        if self.num_members < 1:
            raise ValueError(f"`num_members` is {self.num_members}; set it to 1 or more.")


__all__ = ["MoleBlendConfig", "MoleBlendEnsembleConfig"]
