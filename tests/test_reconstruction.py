"""What reconstruction scores promise: the model's own losses, one a molecule, whatever the batch, atom order and orientation."""

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem
from scipy.spatial.transform import Rotation
from tiny import golden_model, golden_molecules, tiny_config

from moleblend_hf import (
    MoleBlendForPreTraining,
    MoleBlendModel,
    MoleBlendProcessor,
    MoleculeError,
    ReconstructionScores,
    reconstruction_scores,
)
from moleblend_hf.blending_moleblend import ATOM_DEGREE, ATOM_DISTANCE, PAIR_BOND_PATH, PAIR_DISTANCE

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
NAMES = [field.name for field in fields(ReconstructionScores)]
WITHOUT_NOISE = [name for name in NAMES if name != "coordinate_denoising_loss"]


@pytest.fixture(scope="module")
def processor():
    return MoleBlendProcessor()


@pytest.fixture(scope="module")
def model():
    """The golden weights: drawn wide, so that every input moves the output."""
    return golden_model("pretrain").eval()


@pytest.fixture(scope="module")
def molecules():
    """SMILES of different sizes, and geometries."""
    smiles, coordinates = golden_molecules("pretrain")
    real = [index for index, xyz in enumerate(coordinates) if len(xyz) > 1 and np.any(xyz)]
    assert len(real) > 3
    return [smiles[index] for index in real], [coordinates[index] for index in real]


def assert_same(first: ReconstructionScores, second: ReconstructionScores, names=NAMES) -> None:
    for name in names:
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-5, rtol=0, err_msg=name)


def losses_alone(model, processor, smiles, coordinates, pair_modality, atom_modality, noise=None):
    """The model's output for one molecule that shows one relation."""
    batch = processor(smiles, coordinates=coordinates)
    size = batch["attention_mask"].shape[1]
    with torch.no_grad():
        return model(
            **batch,
            pair_modality_ids=torch.full((1, size, size), pair_modality),
            atom_modality_ids=torch.full((1, size), atom_modality),
            coordinate_noise=torch.zeros(1, size, 3) if noise is None else noise,
        )


def test_scores_are_the_losses_of_each_molecule_alone(model, processor, molecules):
    scores = reconstruction_scores(model, processor, *molecules, batch_size=3, seed=5)
    for index, (smiles, xyz) in enumerate(zip(*molecules, strict=True)):
        one = (model, processor, smiles, xyz)
        from_geometry = losses_alone(*one, PAIR_DISTANCE, ATOM_DISTANCE)
        noise = torch.randn(len(xyz), 3, generator=torch.Generator().manual_seed(5))[None] * model.config.noise_std
        denoised = losses_alone(*one, PAIR_DISTANCE, ATOM_DISTANCE, noise)
        from_bonds = losses_alone(*one, PAIR_BOND_PATH, ATOM_DEGREE)
        assert scores.shortest_path_loss[index] == pytest.approx(from_geometry.shortest_path_loss.item(), abs=1e-5)
        assert scores.bond_path_loss[index] == pytest.approx(from_geometry.bond_path_loss.item(), abs=1e-5)
        assert scores.coordinate_denoising_loss[index] == pytest.approx(
            denoised.coordinate_denoising_loss.item(), abs=1e-5
        )
        paths, hops, *_ = from_geometry.num_targets.tolist()
        both = paths * from_geometry.shortest_path_loss.item() + hops * from_geometry.bond_path_loss.item()
        assert scores.graph_loss[index] == pytest.approx(both / paths, abs=1e-4)
        # The best rotation, by another implementation.
        pairs = ~np.eye(len(xyz), dtype=bool)
        true = (np.asarray(xyz)[None] - np.asarray(xyz)[:, None])[pairs]
        predicted = from_bonds.predicted_relative_positions[0].numpy()[pairs].astype(float)
        true, predicted = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (true, predicted))
        rotation, _ = Rotation.align_vectors(true, predicted)
        best = 1 - (rotation.apply(predicted) * true).sum(1).mean()
        assert scores.relative_position_loss[index] == pytest.approx(best, abs=1e-4)
        assert best <= from_bonds.relative_position_loss.item() + 1e-6


def test_a_distance_target_is_scored_in_angstrom(processor, molecules):
    torch.manual_seed(0)
    model = MoleBlendForPreTraining(tiny_config(relative_position_target="distance"))
    scores = reconstruction_scores(model, processor, *molecules)
    for index, (smiles, xyz) in enumerate(zip(*molecules, strict=True)):
        alone = losses_alone(model.eval(), processor, smiles, xyz, PAIR_BOND_PATH, ATOM_DEGREE)
        assert scores.relative_position_loss[index] == pytest.approx(alone.relative_position_loss.item(), abs=1e-5)


def test_batch_composition_changes_nothing(model, processor, molecules):
    smiles, coordinates = molecules
    whole = reconstruction_scores(model, processor, smiles, coordinates)
    backward = reconstruction_scores(model, processor, smiles[::-1], coordinates[::-1], batch_size=2)
    assert_same(whole, ReconstructionScores(*(getattr(backward, name)[::-1] for name in NAMES)))


def test_rotation_and_translation_change_no_score_without_noise(model, processor, molecules):
    smiles, coordinates = molecules
    rotation = Rotation.from_euler("xyz", [25, 130, -70], degrees=True).as_matrix()
    moved = [xyz @ rotation.T + [1.5, -0.7, 2.2] for xyz in coordinates]
    before = reconstruction_scores(model, processor, smiles, coordinates)
    assert_same(before, reconstruction_scores(model, processor, smiles, moved), WITHOUT_NOISE)


def test_a_mirror_image_is_not_a_rotation(model, processor, molecules):
    smiles, coordinates = molecules
    mirrored = [xyz * [-1, 1, 1] for xyz in coordinates]
    before, after = (reconstruction_scores(model, processor, smiles, xyz) for xyz in (coordinates, mirrored))
    assert np.abs(before.relative_position_loss - after.relative_position_loss).max() > 1e-3


def test_atom_order_changes_no_score_without_noise(model, processor, molecules):
    smiles, coordinates = molecules
    generator = np.random.default_rng(0)
    mols = [Chem.MolFromSmiles(one) for one in smiles]
    orders = [generator.permutation(mol.GetNumAtoms()).tolist() for mol in mols]
    renumbered = [Chem.RenumberAtoms(mol, order) for mol, order in zip(mols, orders, strict=True)]
    permuted = [xyz[order] for xyz, order in zip(coordinates, orders, strict=True)]
    before = reconstruction_scores(model, processor, mols, coordinates)
    assert_same(before, reconstruction_scores(model, processor, renumbered, permuted), WITHOUT_NOISE)


def test_the_seed_is_all_that_is_random(processor, molecules):
    """Dropout is off, no draw is taken from the global generator, and the model is left as it was."""
    torch.manual_seed(0)
    model = MoleBlendForPreTraining(tiny_config()).train()
    state = torch.get_rng_state()
    first = reconstruction_scores(model, processor, *molecules, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    second = reconstruction_scores(model, processor, *molecules, seed=1)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    other = reconstruction_scores(model, processor, *molecules, seed=2)
    assert_same(first, other, WITHOUT_NOISE)
    assert (first.coordinate_denoising_loss != other.coordinate_denoising_loss).all()


def test_a_single_atom_has_nothing_to_predict(model, processor):
    scores = reconstruction_scores(model, processor, ["C", "CCO"], [np.ones((1, 3)), np.eye(3)])
    for name in NAMES:
        values = getattr(scores, name)
        assert np.isnan(values[0])
        assert np.isfinite(values[1])


def test_geometries_are_scored_with_a_processor_that_shows_none(model, processor, molecules):
    expected = reconstruction_scores(model, processor, *molecules)
    assert_same(expected, reconstruction_scores(model, MoleBlendProcessor(modality="2d"), *molecules))


def test_a_molecule_without_geometry_is_named(model, processor):
    message = (
        r"Molecule 1 \('CCO'\) has no geometry, so there is none to score\. Pass `coordinates`, or RDKit molecules"
    )
    with pytest.raises(MoleculeError, match=message):
        reconstruction_scores(model, processor, ["CC", "CCO"], [np.eye(3)[:2], None])


def test_a_model_without_the_heads_is_an_error(processor):
    with pytest.raises(
        TypeError, match=r"MoleBlendModel does not have\. Load the checkpoint as MoleBlendForPreTraining"
    ):
        reconstruction_scores(MoleBlendModel(tiny_config()), processor, ["C"], [np.zeros((1, 3))])


# The benchmark.


def test_geometry_check_compares_records_of_one_title(tmp_path, molecules, capsys):
    import geometry_check

    torch.manual_seed(0)
    MoleBlendForPreTraining(tiny_config()).save_pretrained(tmp_path / "model")
    MoleBlendProcessor().save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    for name, noise in (("dft", 0), ("mmff", 0.1)):
        with Chem.SDWriter(str(tmp_path / f"{name}.sdf")) as writer:
            for smiles, xyz in zip(*molecules, strict=True):
                mol = Chem.MolFromSmiles(smiles)
                conformer = Chem.Conformer(mol.GetNumAtoms())
                conformer.SetPositions(xyz + generator.normal(size=xyz.shape) * noise)
                mol.AddConformer(conformer)
                mol.SetProp("_Name", smiles if name == "dft" or smiles != molecules[0][0] else "another")
                writer.write(mol)
    files = ["--dft", str(tmp_path / "dft.sdf"), "--mmff", str(tmp_path / "mmff.sdf")]
    geometry_check.main(["--model", str(tmp_path / "model"), *files, "--plot", str(tmp_path / "scores.png")])
    printed = capsys.readouterr().out
    assert f"{len(molecules[0]) - 1} molecules" in printed
    assert all(name in printed for name in NAMES)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_geometry_check_compares_ranks():
    from geometry_check import aligned, compare

    low, high = np.array([0.0, 1.0, 2.0, np.nan]), np.array([0.5, 1.5, 2.5, 0.0])
    assert compare(low, high) == pytest.approx((6 / 9, 1.0))
    assert compare(low, low) == (0.5, 0.5)
    reference = np.random.default_rng(0).normal(size=(5, 3))
    moved = reference @ Rotation.from_euler("xyz", [1, 2, 3]).as_matrix().T + 4
    np.testing.assert_allclose(aligned(moved, reference), reference, atol=1e-8)
