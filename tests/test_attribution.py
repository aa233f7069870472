"""What attributions promise: they sum to what the atom features make of the output, in its units and in the input's atom order."""

import importlib.util
import re
import sys
import warnings
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image
from rdkit import Chem
from tiny import golden_model, tiny_config

from moleblend_hf import (
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendModel,
    MoleBlendProcessor,
    MoleculeError,
)
from moleblend_hf import attribution as module
from moleblend_hf.attribution import atom_attributions, draw_attributions

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
KINDS = {
    "regression": {
        "problem_type": "regression",
        "num_labels": 2,
        "target_means": [5.0, -300.0],
        "target_scales": [1.0, 40.0],
    },
    "binary": {"problem_type": "multi_label_classification", "num_labels": 2},
    "classes": {"problem_type": "single_label_classification", "num_labels": 3},
}


@pytest.fixture(scope="module")
def processor():
    return MoleBlendProcessor()


def seeded_model(kind: str, seed: int = 0) -> MoleBlendForSequenceClassification:
    """Weights drawn wide, so that every input moves the output."""
    torch.manual_seed(seed)
    return MoleBlendForSequenceClassification(tiny_config(initializer_range=0.3, **KINDS[kind]))


def output(model, batch, kind: str, target: int, without_features: bool = False) -> float:
    """What is attributed, for one molecule."""
    model.eval()
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, embeddings: embeddings * (not without_features)
    )
    with torch.no_grad():
        logits = model(**batch).logits[0]
    hook.remove()
    return (logits.log_softmax(-1) if kind == "classes" else logits)[target].item()


@pytest.fixture(scope="module")
def geometry():
    return np.random.default_rng(0).normal(scale=2, size=(Chem.MolFromSmiles(ASPIRIN).GetNumAtoms(), 3))


@pytest.mark.parametrize("shown", ["2d", "2d+3d", "3d"])
@pytest.mark.parametrize("kind", KINDS)
def test_attributions_sum_to_what_the_atom_features_change(kind, shown, processor, geometry):
    model = seeded_model(kind)
    processor = MoleBlendProcessor(modality=shown)
    batch = processor(ASPIRIN, coordinates=geometry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = 256 if shown == "3d" else 64
        attributions = atom_attributions(model, processor, ASPIRIN, target=1, steps=steps, coordinates=geometry)
    assert attributions.shape == (13,)
    assert attributions.dtype == np.float64
    change = output(model, batch, kind, 1) - output(model, batch, kind, 1, without_features=True)
    assert abs(change) > 1e-3
    assert attributions.sum() == pytest.approx(change, abs=0.01 * np.abs(attributions).sum())


def test_ablation_is_the_output_less_that_without_the_features_of_the_atom(processor, geometry):
    model = golden_model("finetune").eval()
    batch = processor(ASPIRIN, coordinates=geometry)
    attributions = atom_attributions(model, processor, ASPIRIN, 2, method="ablation", coordinates=geometry)
    for atom, attribution in enumerate(attributions):
        keep = torch.ones(1, 13, 1).index_fill(1, torch.tensor([atom]), 0)
        hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, out, keep=keep: out * keep)
        with torch.no_grad():
            without = model(**batch).logits[0, 2]
            hook.remove()
            assert attribution == pytest.approx((model(**batch).logits[0, 2] - without).item(), abs=1e-5)


@pytest.mark.parametrize("method", module.METHODS)
def test_attributions_follow_the_atoms(processor, method):
    model = seeded_model("regression")
    mol = Chem.MolFromSmiles(ASPIRIN)
    order = np.random.default_rng(0).permutation(mol.GetNumAtoms()).tolist()
    before = atom_attributions(model, processor, mol, method=method)
    after = atom_attributions(model, processor, Chem.RenumberAtoms(mol, order), method=method)
    np.testing.assert_allclose(after, before[order], atol=1e-4)
    assert before[0] != pytest.approx(before[1], abs=1e-3)


def test_a_target_is_an_index_or_a_name(processor):
    model = seeded_model("regression")
    model.config.id2label = {0: "logP", 1: "melting point"}
    first, second = (atom_attributions(model, processor, "CCO", target) for target in (0, 1))
    np.testing.assert_array_equal(second, atom_attributions(model, processor, "CCO", "melting point"))
    np.testing.assert_array_equal(second, atom_attributions(model, processor, "CCO", np.int64(1)))
    assert np.abs(first - second).max() > 1e-3
    for wrong in (2, -1, "boiling point"):
        with pytest.raises(
            ValueError, match=rf"`target` is {wrong!r}, but the model predicts 0: logP, 1: melting point"
        ):
            atom_attributions(model, processor, "CCO", wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_gives_the_mean_of_its_members(kind, processor):
    members = [seeded_model(kind, seed) for seed in (0, 1)]
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members(members)
    alone = [atom_attributions(member, processor, ASPIRIN) for member in members]
    np.testing.assert_allclose(atom_attributions(ensemble, processor, ASPIRIN), np.mean(alone, axis=0), atol=1e-5)


def test_several_conformers_give_the_mean(processor, geometry):
    model = seeded_model("regression")
    both = atom_attributions(model, processor, ASPIRIN, coordinates=np.stack([geometry, 1.5 * geometry]))
    alone = [atom_attributions(model, processor, ASPIRIN, coordinates=scale * geometry) for scale in (1, 1.5)]
    np.testing.assert_allclose(both, np.mean(alone, axis=0), atol=1e-4)


def test_parts_of_the_path_change_nothing(processor, monkeypatch):
    model = seeded_model("classes")
    whole = {method: atom_attributions(model, processor, ASPIRIN, method=method) for method in module.METHODS}
    monkeypatch.setattr(module, "MAX_PAIRS", 3 * 13**2)
    for method, values in whole.items():
        np.testing.assert_allclose(atom_attributions(model, processor, ASPIRIN, method=method), values, atol=1e-5)


def test_the_model_is_left_as_it_was(processor):
    """Also where it is frozen, in training with dropout, and gradients are off."""
    model = seeded_model("regression").train().requires_grad_(False)
    expected = atom_attributions(seeded_model("regression").eval(), processor, "CCO")
    with torch.no_grad():
        np.testing.assert_allclose(atom_attributions(model, processor, "CCO"), expected, atol=1e-6)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_a_quadrature_that_is_too_coarse_warns(processor):
    with pytest.warns(
        UserWarning, match=r"attributions sum to .*, but the output with atom features .* Raise `steps`"
    ):
        atom_attributions(seeded_model("regression"), processor, ASPIRIN, steps=1)


def test_errors_say_what_to_do(processor):
    model = seeded_model("regression")
    with pytest.raises(
        ValueError, match="`method` is 'lime', but has to be one of 'integrated_gradients', 'ablation'"
    ):
        atom_attributions(model, processor, "CCO", method="lime")
    for other in (MoleBlendModel, MoleBlendForTokenClassification):
        message = rf"{other.__name__} predicts no property of a molecule\. Pass a fine-tuned"
        with pytest.raises(TypeError, match=message):
            atom_attributions(other(tiny_config()), processor, "CCO")
    with pytest.raises(MoleculeError, match="could not be parsed"):
        atom_attributions(model, processor, "C1CC")


def test_without_captum_the_module_imports_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    spec = importlib.util.spec_from_file_location("moleblend_hf.without_captum", module.__file__)
    without_captum = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without_captum)
    for function in (without_captum.atom_attributions, without_captum.draw_attributions):
        with pytest.raises(ImportError, match=r"need captum, which is not installed\. Run `pip install captum`"):
            function(None, None, None)


# Pictures.


def circles(svg: str) -> list[str]:
    """Fill colours of the highlighted atoms, in order."""
    return re.findall(r"class='atom-\d+'\s+style='fill:(#\w{6})", svg)


def test_red_raises_blue_lowers_and_white_does_neither(tmp_path):
    draw_attributions("CCO", [-1.0, 0.0, 0.5], tmp_path / "ethanol.svg")
    svg = (tmp_path / "ethanol.svg").read_text()
    lowers, neither, raises = (tuple(bytes.fromhex(color[1:])) for color in circles(svg))
    assert lowers[0] < lowers[1] < lowers[2]
    assert neither == (255, 255, 255)
    assert raises[0] > raises[1] > raises[2]
    assert "darkest: 1<" in svg
    draw_attributions("CCO", [0.0, 0.0, 0.0], tmp_path / "none.svg")
    assert set(circles((tmp_path / "none.svg").read_text())) == {"#FFFFFF"}


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_legend_may_say_anything(tmp_path, suffix):
    legend = "<script>alert('1')</script> & \"Å\" ]]> \x00\x1b µmol/L \N{MINUS SIGN}1.2\n" + 300 * "x"
    path = tmp_path / f"picture.{suffix}"
    draw_attributions("CCO", [0.1, 0.2, 0.3], path, legend)
    if suffix == "png":
        with Image.open(path) as image:
            assert image.size[0] == module.WIDTH
            image.verify()
        return
    elements = list(ET.fromstring(path.read_bytes()).iter())
    assert {element.tag.rpartition("}")[2] for element in elements} <= {"svg", "rect", "path", "ellipse", "text"}
    written = "".join(element.text for element in elements if element.tag.endswith("text"))
    assert written.startswith("<script>alert('1')</script> & \"Å\" ]]>")
    assert "x" * module.LINE_LENGTH in written
    assert "µmol/L \N{MINUS SIGN}1.2" in written


def test_hydrogens_are_drawn_if_they_have_attributions(tmp_path):
    mol = Chem.AddHs(Chem.MolFromSmiles("CO"))
    path = tmp_path / "methanol.svg"
    model = seeded_model("regression")
    for hydrogens, num_atoms in (("drop", 2), ("keep", 6), ("add", 6)):
        attributions = atom_attributions(model, MoleBlendProcessor(hydrogens=hydrogens), mol)
        assert len(attributions) == num_atoms
        draw_attributions(mol, attributions, path)
        assert len(circles(path.read_text())) == num_atoms
    draw_attributions("CO", np.arange(6), path)  # hydrogens="add"
    assert len(circles(path.read_text())) == 6


def test_atoms_of_which_rdkit_determines_no_bonds_are_drawn_without(tmp_path):
    ammonium = (["N", *"HHHH"], np.array([[0, 0, 0], [1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]]) * 0.6)
    draw_attributions(ammonium, np.arange(5), tmp_path / "a.svg")
    assert len(circles((tmp_path / "a.svg").read_text())) == 5


def test_a_geometry_does_not_end_up_in_the_drawing(tmp_path):
    flat, bent = Chem.MolFromSmiles("CCO"), Chem.MolFromSmiles("CCO")
    conformer = Chem.Conformer(3)
    conformer.SetPositions(np.array([[0, 0, 0], [0, 0, 1.5], [0.1, 0, 3.0]]))
    bent.AddConformer(conformer)
    for mol, name in ((flat, "flat"), (bent, "bent")):
        draw_attributions(mol, [1, 2, 3], tmp_path / f"{name}.svg")
    assert (tmp_path / "flat.svg").read_text() == (tmp_path / "bent.svg").read_text()


def test_drawing_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"'.*a\.gif' ends in neither \.svg nor \.png"):
        draw_attributions("CCO", [1, 2, 3], tmp_path / "a.gif")
    with pytest.raises(
        ValueError, match=r"There are 4 attributions, but 'CCO' has 3 atoms without hydrogens, .* 9 with all"
    ):
        draw_attributions("CCO", [1, 2, 3, 4], tmp_path / "a.svg")
    with pytest.raises(MoleculeError, match=r"^Molecule 'C1CC' could not be parsed by RDKit"):
        draw_attributions("C1CC", [1, 2, 3], tmp_path / "a.svg")
    for wrong in ([[1.0, 2.0, 3.0]], [1.0, 2.0, float("nan")]):
        with pytest.raises(ValueError, match="Pass a finite number for each atom"):
            draw_attributions("CCO", wrong, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
