"""The demo says what the pipeline says, of any checkpoint; errors are sentences, names are text, and nothing leaves the machine."""

import json
import re
import runpy
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from tiny import SMILES, tiny_config

from moleblend_hf import (
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendPipeline,
    MoleBlendProcessor,
    attribution,
    demo,
    embed_graphs,
    geometry_view,
    molecule_page,
)
from moleblend_hf.molecule_files import MoleculeRow, read_molecules
from moleblend_hf.molecule_page import MoleculePage, read_first
from moleblend_hf.neighbours import Neighbours, embedder_of

gr = pytest.importorskip("gradio", reason="the extra `demo` is not installed")
pytest.importorskip("plotly", reason="the extra `demo` is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:::gradio")  # about pandas
ROOT = Path(__file__).parent.parent
ASPIRIN = SMILES[0]
# Would be run as HTML, as a template of gradio, or at the end of a script.
HOSTILE = "</script><script>window.ran=1</script><img src=x onerror='window.ran=1'>{{7}}${window.ran=1}"


def regression(**changes):
    names = {"id2label": {0: "gap", 1: HOSTILE}, "label2id": {"gap": 0, HOSTILE: 1}, "target_units": ["eV", HOSTILE]}
    calibration = {"conformal_coverage": 0.9, "conformal_quantiles": [0.5, None]}
    config = {"problem_type": "regression", "initializer_range": 0.3, **names, **calibration, **changes}
    return MoleBlendForSequenceClassification(tiny_config(**config))


def classification(problem_type, **changes):
    names = {"id2label": {0: "low", 1: "high"}, "label2id": {"low": 0, "high": 1}, "problem_type": problem_type}
    return MoleBlendForSequenceClassification(tiny_config(**names, conformal_coverage=0.9, **changes))


def predictor_of(model, **settings) -> MoleBlendPipeline:
    return MoleBlendPipeline(model=model.eval(), feature_extractor=MoleBlendProcessor(**settings), device="cpu")


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return predictor_of(regression())


@pytest.fixture(scope="module")
def page(predictor):
    rows = [MoleculeRow(f"{HOSTILE} {index}", smiles, smiles, {"gap": index}) for index, smiles in enumerate(SMILES)]
    return MoleculePage(predictor, HOSTILE, rows)


class Text(HTMLParser):
    """Tags, attributes and text of a piece of HTML."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def table_of(html: str) -> list[dict[str, str]]:
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", line) for line in re.findall("<tr>(.*?)</tr>", html)]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def with_geometry(smiles: str, name: str = "") -> Chem.Mol:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=1)
    mol.SetProp("_Name", name)
    return mol


# What is shown


def test_the_prediction_is_the_pipelines_with_all_it_knows(page, predictor):
    gap = predictor(ASPIRIN)["predictions"]["gap"]
    first, second = table_of(page.answer(ASPIRIN).prediction)
    interval = f"{gap['lower']:.4g} to {gap['upper']:.4g}"
    assert first == {"Target": "gap", "Value": f"{gap['value']:.4g}", "Unit": "eV", "90% interval": interval}
    assert second["90% interval"] == "– to –"  # noqa: RUF001


def test_ensembles_and_conformers_have_spreads():
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members([regression(), regression()])
    predictor = predictor_of(ensemble, modality="2d+3d", num_conformers=2)
    answer = MoleculePage(predictor, "esol").answer("CCCO")
    row, told = table_of(answer.prediction)[0], predictor("CCCO")["predictions"]["gap"]
    assert row["± models"] == f"{told['ensemble_spread']:.4g}"
    assert row["± conformers"] == f"{told['conformer_spread']:.4g}"
    assert "from bonds and geometry" in answer.prediction
    assert "Geometry from RDKit, the first of 2, as the model was shown it" in answer.geometry_note


def test_classes_and_binary_tasks_have_probabilities_and_sets():
    predictor = predictor_of(classification("single_label_classification", conformal_quantiles=[1.0]))
    html = MoleculePage(predictor, "toxicity").answer("CCO").prediction
    answer = predictor("CCO")
    assert [row["Class"] for row in table_of(html)] == ["low", "high"]
    assert [row["Probability"] for row in table_of(html)] == [
        f"{told['value']:.4g}" for told in answer["predictions"].values()
    ]
    assert f"most likely {answer['prediction']} · 90% set low, high<" in html
    predictor = predictor_of(classification("multi_label_classification", conformal_quantiles=[1.0, 0.0]))
    rows = table_of(MoleculePage(predictor, "toxicity").answer("CCO").prediction)
    assert [row["90% set"] for row in rows] == ["0, 1", "none"]


def test_a_model_of_atoms_has_a_row_for_each(page):
    charges = {"id2label": {0: "charge"}, "label2id": {"charge": 0}, "problem_type": "regression"}
    predictor = predictor_of(MoleBlendForTokenClassification(tiny_config(**charges)))
    answer = MoleculePage(predictor, "charges").answer("CCO")
    rows = table_of(answer.prediction)
    assert [row["Atom"] for row in rows] == ["C 0", "C 1", "O 2"]
    values = predictor("CCO")["predictions"]["charge"]["value"]
    assert [row["Value"] for row in rows] == [f"{value:.4g}" for value in values]
    assert answer.picture != page.answer("CCO").picture  # its atoms are numbered


def test_a_pretrained_model_has_all_but_predictions():
    predictor = predictor_of(MoleBlendForPreTraining(tiny_config()))
    page = MoleculePage(predictor, "base", [MoleculeRow("ethanol", "CCO", "CCO")])
    answer = page.answer("OCC")
    assert answer.prediction == answer.message == ""
    assert "cosine 1.000" in answer.neighbours
    assert "<svg" in answer.picture
    assert len(answer.geometry.data) == 2
    assert "predicts nothing" in page.heading()


def test_attributions_are_those_of_the_target_and_say_in_what(page):
    graph = page.answer(ASPIRIN).graph
    gap, other = (page.attributed(ASPIRIN, graph, target) for target in (0, 1))
    assert "gap (eV)" in gap
    assert "&lt;/script&gt;" in other
    assert gap.count("atom-") == other.count("atom-") > 0
    assert re.findall("fill:#\\w+", gap) != re.findall("fill:#\\w+", other)


def test_without_captum_the_picture_is_plain_and_says_so(page, monkeypatch):
    monkeypatch.setattr(attribution, "LayerIntegratedGradients", None)
    html = page.attributed("CCO", page.answer("CCO").graph, 0)
    assert "<svg" in html
    assert "Run `pip install captum`" in html


def test_large_molecules_and_coarse_attributions_are_said(page, monkeypatch):
    graph = page.answer(ASPIRIN).graph
    monkeypatch.setattr(attribution, "INCOMPLETE", 0.0)
    assert "The attributions sum to" in page.attributed(ASPIRIN, graph, 0)
    monkeypatch.setattr(molecule_page, "MAX_ATTRIBUTED", 12)
    assert "at most 12 atoms" in page.attributed(ASPIRIN, graph, 0)
    large = MoleculePage(predictor_of(page.model, max_atoms=600), "large").answer("C" * 600)
    assert "<svg" in large.picture
    assert table_of(large.prediction)


# Geometries


def test_the_geometry_of_a_file_is_shown_to_the_model(page, predictor, tmp_path):
    path = tmp_path / "two.sdf"
    with Chem.SDWriter(str(path)) as writer:
        for smiles in ("CCO", "C"):
            writer.write(with_geometry(smiles))
    molecule, message = read_first(str(path))
    answer = page.answer(molecule)
    assert "Geometry of the file, as the model was shown it" in answer.geometry_note
    assert table_of(answer.prediction)[0]["Value"] == f"{predictor(molecule)['predictions']['gap']['value']:.4g}"
    assert table_of(answer.prediction)[0]["Value"] != table_of(page.answer("CCO").prediction)[0]["Value"]
    assert "the first of the molecules" in message
    assert "Geometry from RDKit; the model was shown bonds alone" in page.answer("CCO").geometry_note


def test_where_there_is_no_geometry_the_reason_is_said(predictor):
    processor = MoleBlendProcessor(max_conformer_atoms=5)
    page = MoleculePage(MoleBlendPipeline(model=predictor.model, feature_extractor=processor, device="cpu"), "x")
    answer = page.answer("CCO")
    assert answer.geometry is None
    assert "No geometry: it has no conformer: 9 atoms with hydrogens are more than" in answer.geometry_note
    assert table_of(answer.prediction)


def test_a_view_is_the_geometry_turned_and_not_its_mirror_image():
    graph = MoleBlendProcessor(hydrogens="add").featurize(with_geometry("C[C@H](N)O"))
    figure = geometry_view.view_geometry(graph)
    assert [trace.name for trace in figure.data] == ["H", "C", "N", "O"]
    seen = geometry_view._facing(graph.coordinates[0])
    volumes = [np.linalg.det(positions[1:4] - positions[0]) for positions in (seen, graph.coordinates[0])]
    assert volumes[0] == pytest.approx(volumes[1], rel=1e-4)
    # The ball of each atom is around it, the sticks end between atoms.
    nitrogen = figure.data[2]
    ball = np.stack([nitrogen.x, nitrogen.y, nitrogen.z], -1)[: geometry_view.ROWS * geometry_view.SEGMENTS]
    radius = geometry_view.BALL * Chem.GetPeriodicTable().GetRvdw(7)
    np.testing.assert_allclose(np.linalg.norm(ball - seen[2], axis=1), radius, atol=2e-3)
    faces = np.stack([nitrogen.i, nitrogen.j, nitrogen.k], -1)
    assert faces.max() == len(nitrogen.x) - 1


def test_faces_look_outwards():
    for vertices, faces in (
        geometry_view._ball(np.zeros(3), 1.0),
        geometry_view._stick(np.zeros(3), np.array([0.0, 0, 2])),
    ):
        a, b, c = vertices[faces].transpose(1, 0, 2)
        outwards = (a + b + c) / 3 - vertices.mean(0)
        assert (np.einsum("ij,ij->i", np.cross(b - a, c - a), outwards) >= -1e-9).all()


# Neighbours


def test_neighbours_are_the_nearest_by_cosine(predictor):
    rows = [MoleculeRow(str(index), smiles, smiles) for index, smiles in enumerate([*SMILES, "C1CC"])]
    neighbours = Neighbours.of(embedder_of(predictor), rows)
    assert neighbours.report == "5 molecules; rows that cannot be read: 1"
    processor = predictor.feature_extractor
    *others, asked = embed_graphs(predictor.model, processor, processor.featurize_many([*SMILES, "CCO"]))
    cosines = [asked @ other / np.linalg.norm(asked) / np.linalg.norm(other) for other in others]
    found = neighbours.nearest(asked, 3)
    assert [int(row.id) for _, row in found] == np.argsort(cosines)[::-1][:3].tolist()
    assert [cosine for cosine, _ in found] == pytest.approx(sorted(cosines)[::-1][:3], abs=1e-5)


def test_neighbours_are_bounded_and_there_are_some(predictor):
    rows = [MoleculeRow(str(index), smiles, smiles) for index, smiles in enumerate(SMILES)]
    report = Neighbours.of(embedder_of(predictor), rows, limit=3).report
    assert report == "3 molecules; rows after the first 3 are left out"
    with pytest.raises(ValueError, match="None of the 1 molecules to compare with can be embedded"):
        Neighbours.of(embedder_of(predictor), [MoleculeRow("0", "C1CC", "C1CC")])


def test_measured_values_of_the_targets_are_shown(page, predictor, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    assert "gap: 0</span>" in page.answer(ASPIRIN).neighbours
    mol = with_geometry("CCO", "ethanol")
    mol.SetProp("gap", "7.5")
    with Chem.SDWriter(str(tmp_path / "a.sdf")) as writer:
        writer.write(mol)
    (tmp_path / "a.csv").write_text("name,smiles,gap\nethanol,CCO,7.5\n")
    table = {"smiles": ["CCO"], "gap": [7.5], "name": ["ethanol"], "positions": [[1.0]]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    for name in ("a.sdf", "a.csv", "a.parquet"):
        rows = read_molecules(str(tmp_path / name), id_column=None if name == "a.sdf" else "name")
        page = MoleculePage(predictor, "x", rows)
        assert "<b>ethanol</b><span>cosine" in page.answer("CCO").neighbours
        assert "<span>gap: 7.5</span>" in page.answer("CCO").neighbours


# What goes wrong


@pytest.mark.parametrize(
    ("molecule", "told"),
    [
        ("C1CC", "Molecule &#x27;C1CC&#x27; could not be parsed by RDKit: unclosed ring. Fix it."),
        ("<b>C</b>", "Molecule &#x27;&lt;b&gt;C&lt;/b&gt;&#x27; could not be parsed"),
        ("C" * 600, "has 600 atoms, but `max_atoms` is 512. Raise `max_atoms`"),
    ],
)
def test_errors_are_a_message_with_a_remedy_and_the_next_molecule_works(page, molecule, told):
    answer = page.answer(molecule)
    assert told in answer.message
    assert answer._replace(message="") == molecule_page.Answer()
    assert page.answer("CCO").message == ""


def test_files_without_a_molecule_are_said(page, tmp_path):
    for text, told in (("", "the file is empty"), ("no\nmolecule\nhere\n\n", "could not be read by RDKit")):
        (tmp_path / "a.sdf").write_text(text)
        assert told in page.answer(read_first(str(tmp_path / "a.sdf"))[0]).message


def test_a_molecule_that_does_not_fit_into_memory_is_said(page, monkeypatch):
    def forward(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(page.model, "forward", forward)
    assert "do not fit into the memory of cpu alone. Try a smaller one" in page.answer("CCO").message


def test_without_gradio_it_is_said_what_to_install(page, monkeypatch):
    monkeypatch.setattr(demo, "gr", None)
    with pytest.raises(ImportError, match=r"needs gradio, which is not installed\. Run `pip install gradio plotly`"):
        demo.build_demo(page)
    monkeypatch.setattr(geometry_view, "go", None)
    with pytest.raises(ImportError, match=r"needs plotly, which is not installed\. Run `pip install plotly`"):
        geometry_view.require_plotly()


# Names are text


def test_names_are_text_wherever_they_are_shown(page):
    marked = "CCO |$<img src=x onerror=alert(1)>;;$,atomProp:1.atomNote.<script>alert(1)</script>|"
    for molecule in (with_geometry("CCO", HOSTILE), marked):
        answer = page.answer(molecule)
        coloured = page.attributed(molecule, answer.graph, 1)
        shown = [page.heading(), coloured, *(part for part in answer if isinstance(part, str))]
        for html in map(Text, shown):
            assert not html.tags & {"script", "img", "iframe", "a"}
            assert not {name for name in html.attributes if name.startswith("on")}
        assert HOSTILE in Text(page.heading()).text
        assert HOSTILE in Text(answer.prediction).text
        assert HOSTILE in Text(answer.neighbours).text
        assert answer.message == ""
    named = page.answer(f"{marked} {HOSTILE}")  # a name behind a SMILES is an error, which shows it
    assert "white space in its SMILES" in Text(named.message).text
    assert not Text(named.message).tags & {"script", "img"}
    broken = with_geometry("CCO", HOSTILE)
    broken.GetConformer().SetPositions(np.zeros((9, 3)))
    assert HOSTILE[:20] in Text(page.answer(broken).message).text
    assert "script" not in Text(page.answer(broken).message).tags


# In a browser


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not BROWSER or not DRIVER, reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def asked_hosts():
    """Names of the hosts that this process looks up: of the server, and of the test."""
    hosts, lookup = set(), socket.getaddrinfo

    def noted(host, *args, **kwargs):
        hosts.add(host.decode() if isinstance(host, bytes) else host)
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", noted)
        yield hosts


@pytest.fixture(scope="module")
def url(page, asked_hosts):
    blocks = demo.build_demo(page)
    demo.launch_demo(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser(url):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # Of the last: geometries are drawn by WebGL, also where there is no GPU. No sandbox: containers have none.
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "enable-unsafe-swiftshader"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_window_size(1280, 900)
    driver.get(url)
    yield driver
    driver.quit()


class Browser:
    """What a test does on the page: elements are named by CSS, and what does not work yet is tried again."""

    def __init__(self, driver):
        self.driver = driver

    def until(self, condition):
        """The first true value of a function of the driver."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        # Gradio replaces elements, so that they may be gone when they are looked at.
        wait = WebDriverWait(self.driver, 60, poll_frequency=0.1, ignored_exceptions=[WebDriverException])
        return wait.until(condition)

    def find(self, css: str):
        return self.until(lambda driver: driver.find_element("css selector", css))

    def see(self, css: str) -> None:
        self.until(lambda driver: driver.find_element("css selector", css).is_displayed())

    def wait_for(self, text: str, css: str) -> str:
        """The text of an element once it has that in it."""
        read = "return document.querySelector(arguments[0]).innerText"
        return self.until(lambda driver: text in (found := driver.execute_script(read, css)) and found)

    def click(self, css: str) -> None:
        self.until(lambda driver: driver.find_element("css selector", css).click() or True)

    def ask(self, smiles: str) -> None:
        box = self.find("#smiles textarea, #smiles input")
        box.clear()
        box.send_keys(smiles)
        self.click("#ask")


@needs_browser
def test_the_page_in_a_browser(browser, page, predictor, url, asked_hosts, tmp_path):
    user = Browser(browser)

    def value_of(molecule) -> str:
        return f"{predictor(molecule)['predictions']['gap']['value']:.4g}"

    user.ask(ASPIRIN)
    told = user.wait_for(value_of(ASPIRIN), "#prediction")
    assert HOSTILE in told  # as text: no template and no script
    user.wait_for("gap (eV)", "#picture")
    user.see("#picture svg ellipse")
    user.see("#geometry canvas")
    assert user.wait_for("cosine 1.000", "#neighbours").count("cosine") == len(SMILES)

    user.ask("C1CC")
    assert "could not be parsed by RDKit: unclosed ring. Fix it." in user.wait_for("Molecule", "#message")
    user.until(lambda driver: not driver.find_elements("css selector", "#prediction table"))
    user.ask("CCO")
    user.wait_for(value_of("CCO"), "#prediction")
    user.until(lambda driver: not driver.find_elements("css selector", "#message p"))

    mol = with_geometry("CCO", HOSTILE)
    Chem.MolToMolFile(mol, str(tmp_path / "ethanol.mol"))
    user.find("input[type=file]").send_keys(str(tmp_path / "ethanol.mol"))
    user.wait_for(value_of(mol), "#prediction")

    if demo.editor_html():
        user.click("#draw button")
        browser.switch_to.frame(user.find(".editor iframe"))
        user.until(lambda driver: driver.execute_script("return !!window.editor"))
        browser.execute_script("editor.readGenericMolecularInput('c1ccccc1O')")
        user.until(lambda driver: driver.execute_script("return editor.smiles()"))
        browser.switch_to.default_content()
        user.click("#drawn")
        user.wait_for(value_of("c1ccccc1O"), "#prediction")
        assert user.find("#smiles textarea, #smiles input").get_attribute("value") == "Oc1ccccc1"

    assert browser.execute_script("return window.ran") is None
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
    assert len(requests) > 10
    assert [each for each in requests if not each.startswith((url, "data:", "blob:", "about:"))] == []
    assert not [entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]
    assert asked_hosts <= {"127.0.0.1", "localhost", "::1", None}


@needs_browser
def test_nothing_is_wider_than_a_phone(browser, page, url):
    """After the test above, whose molecule is still there."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    Browser(browser).ask(ASPIRIN)
    Browser(browser).wait_for("cosine 1.000", "#neighbours")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# As a Space


def test_the_space_builds_the_demo(predictor, tmp_path, monkeypatch):
    predictor.save_pretrained(tmp_path / "model")
    (tmp_path / "molecules.csv").write_text("smiles,gap\nCCO,1\n")
    monkeypatch.setenv("MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("NEIGHBOURS", str(tmp_path / "molecules.csv"))
    space = ROOT / "examples" / "space"
    found = runpy.run_path(str(space / "app.py"))
    assert isinstance(found["demo"], gr.Blocks)
    front_matter = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert front_matter["sdk"] == "gradio"
    assert (space / front_matter["app_file"]).is_file()
