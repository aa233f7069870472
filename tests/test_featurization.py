"""Featurization: the original's numbers, independence of how a molecule is written, and bad input."""

import gzip
import json
import re
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from safetensors.numpy import load_file
from scipy.sparse.csgraph import floyd_warshall

from moleblend_hf.featurization_moleblend import (
    ATOM_FEATURE_SIZES,
    NUM_JOINT_BOND_TYPES,
    featurize_molecule,
    featurize_molecules,
)
from moleblend_hf.graphs_moleblend import (
    MAX_DISTANCE,
    UNREACHABLE_DISTANCE,
    FlatGraphs,
    MolecularGraph,
    _groups_of_like_size,
    pair_relations,
    shortest_paths,
)
from moleblend_hf.molecules_moleblend import FeaturizationSettings, MoleculeError, describe_molecule, read_sdf

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from drug_molecules import DRUG_SMILES
from plain_featurization import featurize_plainly

GOLDEN = Path(__file__).parent / "golden"
AS_WRITTEN = FeaturizationSettings(canonical_atom_order=False)
WITH_3D = FeaturizationSettings(modality="2d+3d")
MOLECULES = [
    "CC(=O)Oc1ccccc1C(=O)O",
    "CN1C2CCC1CC(C2)OC(=O)C(CO)c1ccccc1",
    "C[C@H]1CC[C@@H](C)CC1",
    "CCOc1cccc([C@]2(N3CCN(c4ccccc4)CC3)CC[C@@H](C)CC2)c1",  # ring stereo between equivalent neighbours
    "O[C@H]1[C@H](O)[C@@H](O)[C@H](O)[C@H](O)[C@@H]1O",
    "OC[C@@H](O)[C@@H](O)[C@@H](O)CO",
    "C/C=C/C(=O)/C=C\\CCl",
    "C12C3C4C1C1C2C3C41",  # cubane
    "[Na+].CC(=O)[O-]",
    "N[C@@H](Cc1c[nH]c2ccccc12)C(=O)N1CCC[C@H]1C(=O)O",
    "CC12CCC3C(CCC4=CC(=O)CCC34C)C1CCC2O",
    "C[S@](=O)c1ccccc1",
    "[13CH3][C@@H](F)Cl",
    "[Pt](Cl)(Cl)(N)N",
]


def as_rdkit_writes(smiles: str, seed: int) -> tuple[str, list[int]]:
    """Returns another SMILES of a molecule, and for each of its atoms the index in the first."""
    mol = Chem.MolFromSmiles(smiles)
    order = np.random.default_rng(seed).permutation(mol.GetNumAtoms()).tolist()
    shuffled = Chem.RenumberAtoms(mol, order)
    text = Chem.MolToSmiles(shuffled, canonical=False, rootedAtAtom=0)
    written = shuffled.GetPropsAsDict(includePrivate=True, includeComputed=True)["_smilesAtomOutputOrder"]
    return text, [order[index] for index in written]


def assert_permuted(graph: MolecularGraph, order: list[int], other: MolecularGraph) -> None:
    """Atom `i` of the other is atom `order[i]` of the graph, in every feature: equivalent atoms look alike."""
    pairs = np.ix_(order, order)
    assert np.array_equal(graph.atom_features[order], other.atom_features)
    relations, others = graph.relations(), other.relations()
    assert np.array_equal(relations.degree[order], others.degree)
    assert np.array_equal(relations.shortest_path_distance[pairs], others.shortest_path_distance)
    assert np.array_equal(relations.path_bond_types[pairs], others.path_bond_types)


def assert_same(first: MolecularGraph, second: MolecularGraph) -> None:
    for name in MolecularGraph.__slots__:
        left, right = getattr(first, name), getattr(second, name)
        assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right, name


# The original's numbers


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_features_are_those_of_the_original(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    molecules = json.loads((GOLDEN / f"{name}_molecules.json").read_text(encoding="utf-8"))
    smiles, coordinates = [m["smiles"] for m in molecules], [m["coords"] for m in molecules]
    for row, graph in enumerate(featurize_molecules(smiles, coordinates, AS_WRITTEN)):
        n, relations = graph.num_atoms, graph.relations(canonical_atom_order=False)
        hops = relations.path_bond_types[..., None] - 1
        features = np.concatenate([hops // 12, hops % 12 // 2, hops % 2], axis=-1)
        original_hops = np.where(hops < 0, 0, features + 3 + 512 * np.arange(3))
        assert np.array_equal(graph.atom_features + 1 + 512 * np.arange(9), tensors["x"][row, :n])
        assert np.array_equal(relations.degree + 1, tensors["in_degree"][row, :n])
        assert np.array_equal(relations.shortest_path_distance + 1, tensors["spatial_pos"][row, :n, :n])
        assert np.array_equal(original_hops, tensors["edge_input"][row, :n, :n])
        np.testing.assert_allclose(graph.coordinates[0], tensors["pos"][row, :n], atol=1e-6)


def test_features_are_those_of_the_plain_implementation():
    molecules = [*DRUG_SMILES, *MOLECULES, "[NH3]->[Cu]", "N[C@@H](C)c1cc[n+]([O-])cc1.[Fe+2]", "C#CC=C=C[N+]#[C-]"]
    for smiles, graph in zip(molecules, featurize_molecules(molecules, None, AS_WRITTEN), strict=True):
        found = {"atom_features": graph.atom_features} | graph.relations(canonical_atom_order=False)._asdict()
        for name, expected in featurize_plainly(smiles).items():
            assert np.array_equal(found[name], expected), (smiles, name)


def test_vocabulary_sizes_are_those_of_ogb():
    assert ATOM_FEATURE_SIZES == (119, 5, 12, 12, 10, 6, 6, 2, 2)
    assert NUM_JOINT_BOND_TYPES == 60


def test_acetate_has_these_features():
    graph = featurize_molecule("[Na+].CC(=O)[O-]")
    assert graph.atom_features.tolist() == [
        [11, 1, 1, 7, 1, 1, 6, 1, 1],
        [6, 1, 5, 6, 4, 1, 3, 1, 1],
        [6, 1, 4, 6, 1, 1, 2, 1, 1],
        [8, 1, 2, 6, 1, 1, 2, 1, 1],
        [8, 1, 2, 5, 1, 1, 2, 1, 1],
    ]
    relations = graph.relations()
    assert relations.degree.tolist() == [0, 1, 3, 1, 1]
    assert relations.shortest_path_distance[0].tolist() == [0] + [UNREACHABLE_DISTANCE] * 4
    assert relations.shortest_path_distance[1].tolist() == [UNREACHABLE_DISTANCE, 0, 1, 2, 2]
    assert relations.path_bond_types[1, 3].tolist() == [1, 14, 0, 0, 0]  # C-C, then a conjugated C=O
    assert relations.path_bond_types[3, 1].tolist() == [14, 1, 0, 0, 0]
    assert graph.unknown_values == {"hybridization": 1}


def test_stereo_and_conjugation_are_in_the_joint_bond_type():
    relations = featurize_molecule("C/C=C/C(=O)/C=C\\CCl").relations()
    assert relations.path_bond_types[0, 8].tolist() == [1, 18, 2, 2, 16]


def test_phenylalanine_is_a_counterclockwise_centre_in_canonical_order_only():
    tags = [
        featurize_molecule("[NH3+][C@@H](Cc1ccccc1)C(=O)[O-]", None, s).atom_features[1, 1] for s in (None, AS_WRITTEN)
    ]
    other = featurize_molecule("[O-]C(=O)[C@H](Cc1ccccc1)[NH3+]")
    assert tags[0] == other.atom_features[3, 1]
    assert tags[1] == 2  # RDKit's clockwise, as written


def test_paths_follow_scipys_floyd_warshall():
    rng = np.random.default_rng(1)
    for size in (1, 2, 9, 40, 140):
        upper = np.triu(rng.random((size, size)) < 2.5 / size, 1)
        bonded = upper | upper.T
        distance, next_atom = shortest_paths(bonded[None])
        expected, predecessors = floyd_warshall(bonded.astype(float), unweighted=True, return_predecessors=True)
        reachable = np.isfinite(expected)
        assert np.array_equal(distance[0][reachable], expected[reachable])
        assert (distance[0][~reachable] > size).all()
        reachable &= expected > 0
        assert np.array_equal(next_atom[0][reachable], predecessors.T[reachable])


def test_long_distances_are_capped_and_the_path_is_still_followed():
    relations = featurize_molecule("C" * 600, None, FeaturizationSettings(max_atoms=600)).relations()
    assert relations.shortest_path_distance[0, 509] == relations.shortest_path_distance[0, 599] == MAX_DISTANCE
    assert relations.path_bond_types[0, 599].tolist() == [1] * 5


# Independence of how a molecule is written


@pytest.mark.parametrize("smiles", MOLECULES)
def test_another_smiles_gives_the_same_features(smiles):
    graph = featurize_molecule(smiles)
    for seed in range(12):
        text, order = as_rdkit_writes(smiles, seed)
        assert_permuted(graph, order, featurize_molecule(text))


@pytest.mark.parametrize("smiles", MOLECULES)
def test_another_atom_order_gives_the_same_features(smiles):
    mol = Chem.MolFromSmiles(smiles)
    order = np.random.default_rng(0).permutation(mol.GetNumAtoms()).tolist()
    assert_permuted(featurize_molecule(mol), order, featurize_molecule(Chem.RenumberAtoms(mol, order)))


@pytest.mark.parametrize(
    "smiles", ["C1=CCC=CC=CC1", "C1=C[C@@]23CC=C[C@]2(C1)O3", "C12C3C4C1C1=C2C3=C41", "CC.O=C1C=CCO1"]
)
def test_of_several_shortest_paths_the_smallest_is_taken(smiles):
    """Compared bond by bond with every shortest path."""
    mol, graph = Chem.MolFromSmiles(smiles), featurize_molecule(smiles)
    relations = graph.relations()
    distance, bond_types = relations.shortest_path_distance, relations.path_bond_types[..., 0]

    def paths(start: int, stop: int) -> list[list[int]]:
        if start == stop:
            return [[]]
        onward = [atom.GetIdx() for atom in mol.GetAtomWithIdx(start).GetNeighbors()]
        steps = [atom for atom in onward if distance[atom, stop] == distance[start, stop] - 1]
        return [[int(bond_types[start, atom]), *path] for atom in steps for path in paths(atom, stop)]

    for start in range(graph.num_atoms):
        for stop in range(graph.num_atoms):
            shortest = min(paths(start, stop), default=[])[:5]
            assert relations.path_bond_types[start, stop].tolist() == shortest + [0] * (5 - len(shortest))


def test_equivalent_ring_centres_have_one_chirality_and_isomers_differ():
    """Which of two equivalent centres comes first in a SMILES is arbitrary; whether they agree is not."""
    agree, differ = (featurize_molecule(f"C[C@H]1CC[C@{at}H](C)CC1").atom_features[:, 1] for at in ("", "@"))
    assert agree[1] == agree[4] != 1
    assert differ[1] == differ[4] != 1
    assert agree[1] != differ[1]


def test_mirror_images_differ():
    left, right = featurize_molecule("N[C@@H](C)C(=O)O"), featurize_molecule("N[C@H](C)C(=O)O")
    assert not np.array_equal(left.atom_features, right.atom_features)


def test_atom_map_numbers_change_nothing():
    plain, mapped = "CC(F)C1CCC1", "[CH3:3][CH:7]([F:1])[CH:2]1[CH2:9][CH2:4][CH2:5]1"
    assert_same(featurize_molecule(plain), featurize_molecule(mapped))
    assert_same(featurize_molecule(plain, None, WITH_3D), featurize_molecule(mapped, None, WITH_3D))


def test_a_kekulized_or_unsanitized_molecule_gives_the_same_features():
    expected = featurize_molecule("Cc1ccccc1")
    kekulized = Chem.MolFromSmiles("Cc1ccccc1")
    Chem.Kekulize(kekulized, clearAromaticFlags=True)
    assert_same(featurize_molecule(kekulized), expected)
    assert_same(featurize_molecule(Chem.MolFromSmiles("CC1=CC=CC=C1", sanitize=False)), expected)
    assert not kekulized.GetAtomWithIdx(1).GetIsAromatic()  # the user's molecule is left alone


def test_cis_of_a_users_molecule_is_z():
    mol = Chem.MolFromSmiles("CC=CC")
    mol.GetBondWithIdx(1).SetStereoAtoms(0, 3)
    mol.GetBondWithIdx(1).SetStereo(Chem.BondStereo.STEREOCIS)
    assert (
        featurize_molecule(mol).relations().path_bond_types[1, 2, 0]
        == featurize_molecule("C/C=C\\C").relations().path_bond_types[1, 2, 0]
        == 15
    )


def test_rdkits_global_stereo_flag_changes_nothing():
    expected = [featurize_molecule(smiles).relations().path_bond_types for smiles in ("C/C=C\\C", "C/C=C/C")]
    Chem.SetUseLegacyStereoPerception(False)
    try:
        found = [featurize_molecule(smiles).relations().path_bond_types for smiles in ("C/C=C\\C", "C/C=C/C")]
    finally:
        Chem.SetUseLegacyStereoPerception(True)
    assert np.array_equal(found, expected)


def test_many_at_a_time_are_what_they_are_one_by_one():
    molecules = [*MOLECULES, "C", "C1CC", "CCCCCCCCCCCCCCCCCCCCCCCCCCCCCC", Chem.MolFromSmiles("CCO"), "[H][H]"]
    for together, molecule in zip(featurize_molecules(molecules), molecules, strict=True):
        alone = featurize_molecules([molecule])[0]
        if isinstance(alone, MoleculeError):
            assert str(together) == str(alone)
        else:
            assert_same(together, alone)


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("max_path_bonds", [1, 5, 8])
def test_relations_of_many_are_those_of_each(canonical, max_path_bonds):
    """Small ones are worked out as they come, others sorted by size; padding is zero."""
    for copies in (1, 40):
        graphs = featurize_molecules([*MOLECULES, "C", "CCCCCCCCCCCCCCCCCCCCCCCCCCCCCC"] * copies)
        together = pair_relations(FlatGraphs.of(graphs), max_path_bonds, canonical)
        for row in np.random.default_rng(0).choice(len(graphs), 16):
            alone, n = graphs[row].relations(max_path_bonds, canonical), graphs[row].num_atoms
            for name, values in alone._asdict().items():
                padded = getattr(together, name)[row]
                assert np.array_equal(padded[:n, :n] if name != "degree" else padded[:n], values)
                assert padded.sum() == values.sum()


def test_molecules_are_grouped_by_size_where_it_pays():
    """Each once; a few large ones among many small ones do not widen them, and few in all stay together."""
    sizes = np.array([12] * 4 + [9] * 700 + [8] * 300 + [11] * 20)
    groups = list(_groups_of_like_size(sizes))
    assert np.array_equal(np.sort(np.concatenate(groups)), np.arange(len(sizes)))
    assert [int(sizes[group].max()) for group in groups] == [12, 9]
    assert [len(group) for group in _groups_of_like_size(sizes[-60:])] == [60]


def test_isolated_failure_of_rdkit_rejects_one_molecule(monkeypatch):
    ranks = Chem.CanonicalRankAtoms

    def fail_on_fluorine(mol, *arguments):
        if any(atom.GetAtomicNum() == 9 for atom in mol.GetAtoms()):
            raise RuntimeError("out of luck")
        return ranks(mol, *arguments)

    monkeypatch.setattr(Chem, "CanonicalRankAtoms", fail_on_fluorine)
    first, second, third = featurize_molecules(["CCO", "CF", "CC"])
    assert isinstance(first, MolecularGraph)
    assert isinstance(third, MolecularGraph)
    assert "'CF' could not be featurized by RDKit: out of luck" in str(second)


# Odd molecules


@pytest.mark.parametrize(
    ("smiles", "num_atoms", "unknown"),
    [
        ("C", 1, {}),
        ("[Na+]", 1, {"hybridization": 1}),
        ("[H+]", 1, {"hybridization": 1}),
        ("[H][H]", 2, {"hybridization": 2}),
        ("*CC", 3, {"atomic_num": 1, "hybridization": 1}),
        ("[2H]C", 2, {"hybridization": 1}),
        ("[CH3]", 1, {}),
        ("[Cl-].[Cl-].[Fe+2]", 3, None),
        ("[NH3]->[Cu]", 2, None),
        ("Cl[Pt@SP1](Cl)(N)N", 5, None),
        ("N" + "CC(=O)N" * 120 + "C", 482, {}),
    ],
)
def test_odd_molecules_work(smiles, num_atoms, unknown):
    graph = featurize_molecule(smiles)
    assert graph.num_atoms == num_atoms
    assert unknown is None or graph.unknown_values == unknown
    assert (graph.atom_features >= 1).all()
    assert (graph.atom_features <= ATOM_FEATURE_SIZES).all()
    assert graph.relations().path_bond_types.max(initial=0) <= NUM_JOINT_BOND_TYPES


def test_a_dative_bond_is_of_no_named_type():
    assert (featurize_molecule("[NH3]->[Cu]").relations().path_bond_types[0, 1, 0] - 1) // 12 == 4


# Hydrogens


def test_hydrogens_are_dropped_kept_or_added():
    sizes = {
        mode: [
            featurize_molecule(s, None, FeaturizationSettings(hydrogens=mode)).num_atoms for s in ("CO", "[H]C([H])O")
        ]
        for mode in ("drop", "keep", "add")
    }
    assert sizes == {"drop": [2, 2], "keep": [2, 4], "add": [6, 6]}


def test_coordinates_of_written_hydrogens_are_dropped_with_them():
    coordinates = np.arange(12.0).reshape(4, 3) ** 1.5
    graph = featurize_molecule("[H]C([H])O", coordinates)
    np.testing.assert_allclose(graph.coordinates[0], coordinates[[1, 3]], rtol=1e-6)


def test_a_molecule_with_all_hydrogens_gives_what_its_smiles_gives():
    assert_same(featurize_molecule(Chem.AddHs(Chem.MolFromSmiles("CC(N)C(=O)O"))), featurize_molecule("CC(N)C(=O)O"))


# Coordinates


def test_conformers_are_generated_in_the_atom_order_of_the_input():
    smiles = "COc1ccc(C[C@H](N)C(=O)O)c(Cl)c1F"
    settings = FeaturizationSettings(modality="2d+3d", num_conformers=2)
    graph = featurize_molecule(smiles, None, settings)
    assert graph.coordinates.shape == (2, graph.num_atoms, 3)
    bonds = np.linalg.norm(graph.coordinates[:, :, None] - graph.coordinates[:, None], axis=-1)
    assert ((bonds > 1.1) & (bonds < 2.0))[:, graph.relations().shortest_path_distance == 1].all()
    for seed in range(3):
        text, order = as_rdkit_writes(smiles, seed)
        other = featurize_molecule(text, None, settings)
        assert np.array_equal(graph.coordinates[:, order], other.coordinates)


def test_fragments_of_a_salt_do_not_lie_in_one_another():
    for smiles in ("[Na+].[Cl-]", "Cl.CCN(CC)CC(=O)Nc1c(C)cccc1C"):  # MMFF has no parameters for the second
        positions = featurize_molecule(smiles, None, WITH_3D).coordinates[0]
        distances = np.linalg.norm(positions[0] - positions[1:], axis=-1)
        assert 2.0 < distances.min() < 8.0


def test_a_failed_conformer_falls_back_to_2d_or_rejects():
    chain = "C" * 140  # 422 atoms with hydrogens
    graph = featurize_molecule(chain, None, WITH_3D)
    assert graph.coordinates.shape == (0, 140, 3)
    assert "422 atoms with hydrogens are more than `max_conformer_atoms` = 400" in graph.missing_coordinates_reason
    with pytest.raises(MoleculeError, match=r'has no conformer: 422 atoms .* use modality="2d\+3d"'):
        featurize_molecule(chain, None, FeaturizationSettings(modality="3d"))


@pytest.mark.parametrize(
    ("coordinates", "message"),
    [
        (np.full((3, 3), np.nan), "coordinates that are NaN or infinite"),
        ([[0, 0, 0], [1, 0, 0], [1e39, 0, 0]], "coordinates that are NaN or infinite"),
        (np.zeros((3, 3)), "coordinates that are all zero"),
        ([[0, 0, 0], [1, 0, 0], [1, 0, 5e-5]], r"atoms 1 and 2 in one place \(closer than 0.0001 angstrom\)"),
        (np.ones((2, 3)), "has 3 atoms, but 2 rows of coordinates"),
        (np.ones((3, 2)), r"shape \(3, 2\), but \(atoms, 3\)"),
        ([["x", "y", "z"]] * 3, "no array of numbers"),
    ],
)
def test_bad_coordinates_are_named(coordinates, message):
    for molecule in ("CCO", Chem.MolFromSmiles("CCO")):
        with pytest.raises(MoleculeError, match=f"^Molecule 'CCO' .*{message}"):
            featurize_molecule(molecule, coordinates)


def test_one_atom_may_lie_at_the_origin():
    assert featurize_molecule("C", [[0, 0, 0]]).coordinates.tolist() == [[[0, 0, 0]]]


def test_only_3d_conformers_of_a_molecule_are_used():
    mol = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    rdDistGeom.EmbedMultipleConfs(mol, 2, randomSeed=1)
    expected = np.stack([conformer.GetPositions()[:3] for conformer in mol.GetConformers()])
    np.testing.assert_allclose(featurize_molecule(mol).coordinates, expected, atol=1e-6)
    mol.GetConformer(0).Set3D(False)
    assert len(featurize_molecule(mol).coordinates) == 1
    assert len(featurize_molecule(mol, None, FeaturizationSettings(modality="2d")).coordinates) == 0


def test_atoms_without_bonds_are_3d_only_or_get_bonds():
    mol = Chem.AddHs(Chem.MolFromSmiles("CC(=O)O"))
    rdDistGeom.EmbedMolecule(mol, randomSeed=1)
    pair = ([atom.GetSymbol() for atom in mol.GetAtoms()], mol.GetConformer().GetPositions())
    with pytest.raises(MoleculeError, match=r"has no bonds, which modality='auto' needs\. Set `bonds=\"determine\"`"):
        featurize_molecule(pair)
    bare = featurize_molecule(pair, None, FeaturizationSettings(modality="3d"))
    assert not bare.has_bonds
    assert bare.atom_features.tolist() == [[z, 1, 12, 12, 10, 6, 6, 1, 1] for z in (6, 6, 8, 8)]
    found = featurize_molecule(pair, None, FeaturizationSettings(bonds="determine"))
    assert np.array_equal(found.atom_features, featurize_molecule("CC(=O)O").atom_features)
    np.testing.assert_allclose(found.coordinates, bare.coordinates)


# Bad input


@pytest.mark.parametrize(
    ("molecule", "message"),
    [
        ("C1CC", r"^Molecule 'C1CC' could not be parsed by RDKit: unclosed ring. Fix it.$"),
        ("C\ud800", r"^Molecule 'C\\ud800' has characters that are no text: lone surrogates. Fix it.$"),
        (
            "3è\U000e6a64`𗔯Ê\U0006c2ffANÂ$\x0eÞð·Þ\U0004ab12t(\U000e863e",
            r"by RDKit: it has characters of no SMILES. Fix it.$",
        ),
        ("C(C)(C)(C)(C)C", "Explicit valence for atom # 0 C, 5, is greater than permitted"),
        ("", "is an empty SMILES"),
        ("  ", "is an empty SMILES"),
        (None, "is of type NoneType, but has to be a SMILES"),
        (float("nan"), "is of type float"),
        (["CCO"], "only a list is a batch"),
        (Chem.Mol(), "has no atoms"),
        (([], np.zeros((0, 3))), "has no atoms"),
        ((["C", "Qq"], np.eye(3)[:2]), "a symbol that is no element: Element 'Qq' not found"),
        ("C" * 513, "has 513 atoms, but `max_atoms` is 512. Raise `max_atoms`"),
    ],
)
def test_bad_molecules_are_named(molecule, message):
    with pytest.raises(MoleculeError, match=message):
        featurize_molecule(molecule)


@pytest.mark.parametrize(("hydrogens", "symbols"), [("drop", ["C", "H"]), ("keep", ["H"]), ("add", ["O"])])
def test_the_size_of_a_pair_is_checked_before_its_pairs_of_atoms(hydrogens, symbols):
    """That takes memory with the square of the atoms. Hydrogens that are dropped count for nothing."""
    settings = FeaturizationSettings(bonds="determine", hydrogens=hydrogens, max_atoms=20)
    for number, message in ((21, "has 21 atoms, but `max_atoms` is 20"), (20, "has atoms 0 and 1 in one place")):
        pair = (symbols * number, np.ones((len(symbols) * number, 3)))
        with pytest.raises(MoleculeError, match=message):
            featurize_molecule(pair, None, settings)


def test_long_smiles_are_shortened_in_messages():
    assert len(describe_molecule("C" * 5000)) < 100
    with pytest.raises(MoleculeError, match=r"^Molecule 'C{10,70}\.\.\. \(515 characters\) has 513 atoms"):
        featurize_molecule("C" * 513)


def test_rdkits_log_stays_silent(capfd):
    featurize_molecules(["C1CC", "c1cccc1", "[Xx]", "[H]", "CCO"], None, WITH_3D)
    assert capfd.readouterr().err == ""
    Chem.MolFromSmiles("C1CC")
    assert "unclosed ring" in capfd.readouterr().err  # outside of our calls it speaks as before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"hydrogens": "remove"}, "`hydrogens` is 'remove', but has to be one of 'drop', 'keep', 'add'"),
        ({"modality": "4d"}, "`modality` is '4d'"),
        ({"bonds": "guess"}, "`bonds` is 'guess', but has to be one of None, 'determine'"),
        ({"max_atoms": 0}, "`max_atoms` is 0, but has to be an integer of at least 1"),
        ({"num_conformers": 1.5}, "`num_conformers` is 1.5"),
        ({"max_path_bonds": 11}, "`max_path_bonds` is 11, but has to be at most 8"),
        ({"conformer_seed": -1}, "`conformer_seed` is -1, but has to be an integer of at least 0"),
        ({"canonical_atom_order": "yes"}, "`canonical_atom_order` is 'yes', but has to be True or False"),
    ],
)
def test_settings_that_make_no_sense_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        FeaturizationSettings(**setting)


# SDF


def mol_block(smiles: str, dimension: str, z: float) -> str:
    mol = Chem.MolFromSmiles(smiles)
    conformer = Chem.Conformer(mol.GetNumAtoms())
    for index in range(mol.GetNumAtoms()):
        conformer.SetAtomPosition(index, (1.5 * index, 0.5 * (index % 2), z * index))
    mol.AddConformer(conformer)
    lines = Chem.MolToMolBlock(mol).splitlines()
    lines[1] = f"     RDKit          {dimension}"
    return "\n".join(lines) + "\n"


SDF = "$$$$\n".join(
    [
        mol_block("CCO", "3D", 0.0),  # flat, but a geometry
        mol_block("CCN", "2D", 0.3),  # a drawing, whatever its z
        "broken\n\n\n  9  9  0  0  0\nnonsense\nM  END\n",
        "",
        mol_block("CCF", "3D", 0.3) + "> <gap>\n1.5\n\n",
    ]
)


@pytest.mark.parametrize("compress", [False, True])
def test_sdf_records_stay_in_their_places(tmp_path, compress):
    path = tmp_path / ("molecules.sdf.gz" if compress else "molecules.sdf")
    path.write_bytes(gzip.compress(SDF.encode()) if compress else SDF.encode())
    records = list(read_sdf(path))
    assert [isinstance(record, MoleculeError) for record in records] == [False, False, True, True, False]
    assert [records[i].GetConformer().Is3D() for i in (0, 1, 4)] == [True, False, True]
    assert records[4].GetProp("gap") == "1.5"
    with pytest.raises(MoleculeError, match=r"Molecule 2 \(record 'broken' of molecules.sdf.*could not be read"):
        raise records[2]
    graphs = featurize_molecules(records)
    assert [len(graphs[i].coordinates) for i in (0, 1, 4)] == [1, 0, 1]
    assert graphs[3] is records[3]


@pytest.mark.parametrize("end", ["\x1a", "$$$\n", "end of file", "a\nb\nc\n"])
def test_what_follows_the_last_record_is_an_error_in_its_place(tmp_path, end):
    (tmp_path / "molecules.sdf").write_text(mol_block("CCO", "3D", 0.1) + "$$$$\n" + end)
    molecule, last = read_sdf(tmp_path / "molecules.sdf")
    assert molecule.GetNumAtoms() == 3
    with pytest.raises(MoleculeError, match="is cut short: it holds no molecule"):
        raise last


def test_a_drawing_is_one_whatever_its_title_holds(tmp_path):
    """Separators of lines that are none in the format."""
    (tmp_path / "one.sdf").write_text("na\x85\u2028me" + mol_block("CCO", "2D", 0.1), encoding="utf-8")
    (read,) = read_sdf(tmp_path / "one.sdf")
    assert not read.GetConformer().Is3D()


@pytest.mark.parametrize("modality", ["2d", "2d+3d"])
def test_text_that_is_no_utf_8_harms_no_molecule(modality):
    """As RDKit's own reader gives it from a file in Latin-1: it cannot be turned into text."""
    block = Chem.MolToMolBlock(Chem.MolFromSmiles("C[C@H]1CC[C@H](C)CC1"))
    supplier = Chem.ForwardSDMolSupplier(BytesIO(f"n\xe4me{block}> <by>\nSoci\xe9t\xe9\n\n$$$$\n".encode("latin-1")))
    mol = next(supplier)
    assert featurize_molecule(mol, settings=FeaturizationSettings(modality=modality)).num_atoms == 8
    assert "named" not in describe_molecule(mol)


def test_records_without_a_line_between_them_are_not_one_molecule(tmp_path):
    """Of the two, the second's data fields would be taken for the first's."""
    path = tmp_path / "molecules.sdf"
    first, second = mol_block("CCO", "3D", 0.1), mol_block("c1ccccc1", "3D", 0.2) + "> <y>\n2\n\n"
    path.write_text(first + "> <y>\n1\n\n" + second + "$$$$\n" + mol_block("CC", "3D", 0.3))
    joined, last = read_sdf(path)
    assert last.GetNumAtoms() > 0
    with pytest.raises(MoleculeError, match=r"holds several molecules, as if a line \$\$\$\$ were missing"):
        raise joined


def test_a_truncated_gzip_yields_what_is_left_and_then_the_damage(tmp_path):
    path = tmp_path / "cut.sdf.gz"
    records = [mol_block("C" * (1 + i % 40), "3D", 0.1 * (i + 1)) for i in range(400)]
    path.write_bytes(gzip.compress("$$$$\n".join(records).encode())[:-4000])
    *molecules, last = read_sdf(path)
    assert 0 < len(molecules) < 400
    with pytest.raises(MoleculeError, match="lies where the file is damaged"):
        raise last


def test_a_geometry_says_what_a_crossed_double_bond_is(tmp_path):
    """Files of quantum chemistry often mark double bonds as "cis or trans" (3), next to coordinates that tell."""
    for smiles in ("C/C=C/Cl", "C/C=C\\Cl"):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        rdDistGeom.EmbedMolecule(mol, randomSeed=1)
        crossed = re.sub(r"^(  2  3  2)  0", r"\1  3", Chem.MolToMolBlock(mol), flags=re.MULTILINE)
        assert crossed != Chem.MolToMolBlock(mol)
        (tmp_path / "one.sdf").write_text(crossed)
        (read,) = read_sdf(tmp_path / "one.sdf")
        bond_types = [featurize_molecule(given).relations().path_bond_types for given in (read, smiles)]
        assert np.array_equal(*bond_types)
