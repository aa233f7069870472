"""From molecules to a fine-tuned ensemble in a minute on a CPU, cell by cell: `python examples/quickstart.py`, or in an editor.

It needs `pip install -e .` and nothing else: no data, no GPU, no connection. The model is small and starts from random weights, so
what it learns is only a demonstration; name a pretrained folder in CHECKPOINT to start from that.
"""

# %% What all cells use
import tempfile
from pathlib import Path

import torch
from rdkit import Chem
from rdkit.Chem import Crippen
from transformers import pipeline, set_seed

from moleblend_hf import (
    MoleBlendConfig,
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendProcessor,
)
from moleblend_hf.verification import verify, write_reference_outputs

CHECKPOINT = None  # "outputs/pretrain", say
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
set_seed(0)

# %% Molecules become tensors: atoms, and relations between all pairs of them
processor = MoleBlendProcessor() if CHECKPOINT is None else MoleBlendProcessor.from_pretrained(CHECKPOINT)
batch = processor(["CCO", Chem.MolFromSmiles("c1ccccc1O")])
for name, tensor in batch.items():
    print(f"{name:24} {tuple(tensor.shape)}")

# %% With coordinates, distances join them; what cannot be read is left out, and said
batch = processor(["CCO", "C1CC"], modality="2d+3d", on_error="skip")
print("distances from a conformer:", tuple(batch["coordinates"].shape))
for rejected in processor.rejected:
    print(f"left out: molecule {rejected.index}, which {rejected.reason}")

# %% The encoder, under the heads of pretraining
if CHECKPOINT is None:
    pretrained = MoleBlendForPreTraining(MoleBlendConfig(**SMALL))
else:
    pretrained = MoleBlendForPreTraining.from_pretrained(CHECKPOINT)
embeddings = pretrained.moleblend.embed(["CCO", "c1ccccc1O"], processor)
print("a vector a molecule:", tuple(embeddings.molecule_embeddings.shape))

# %% A step of pretraining: each pair shows one of its relations, and the heads ask for all
geometries = processor(["CCO", "CC(=O)Nc1ccc(O)cc1"], modality="2d+3d")
outputs = pretrained.train()(**geometries, generator=torch.Generator().manual_seed(0))
outputs.loss.backward()
print(f"pretraining loss: {outputs.loss.item():.3f}")

# %% Fine-tuning: here on logP as RDKit computes it, which needs no file (training/finetune.py does it with your table)
MOLECULES = """
C CC CCC CCCC CCCCCC CCCCCCCC CO CCO CCCO CCCCO CCCCCCO OCCO OCC(O)CO CC(C)O CC(C)(C)O C=C C=CC CC#C CC#N CCC#N CN CCN CCCN
CCNCC CN(C)C NCCN NCCO COC CCOCC COCCOC C1CCOCC1 C1COCCO1 CC=O CCC=O CC(C)=O CCC(C)=O O=C1CCCCC1 CC(=O)O CCC(=O)O OC(=O)CC(=O)O
CC(N)=O CN(C)C=O CC(=O)OC CC(=O)OCC c1ccccc1 Cc1ccccc1 CCc1ccccc1 Cc1ccccc1C Oc1ccccc1 Nc1ccccc1 COc1ccccc1 O=Cc1ccccc1
OC(=O)c1ccccc1 Fc1ccccc1 Clc1ccccc1 Brc1ccccc1 Clc1ccccc1Cl N#Cc1ccccc1 c1ccncc1 Cc1ccncc1 c1ccoc1 c1ccsc1 c1cc[nH]c1 c1c[nH]cn1
c1ccc2ccccc2c1 c1ccc(-c2ccccc2)cc1 CCCl CCBr ClCCl ClC(Cl)Cl FC(F)F CS CCS CSC CS(C)=O C1CCCCC1 CC1CCCCC1 OC1CCCCC1 NC1CCCCC1
""".split()  # noqa: SIM905 (a list of them would fill the screen)
HELD_OUT = ["CCCCCO", "CCC(=O)OC", "Clc1ccc(O)cc1", "c1ccc(Oc2ccccc2)cc1"]
labels = torch.tensor([[Crippen.MolLogP(Chem.MolFromSmiles(smiles))] for smiles in MOLECULES])
graphs = processor.featurize_many(MOLECULES)


def fine_tuned(seed: int) -> MoleBlendForSequenceClassification:
    """A model that learned the labels, from the encoder above."""
    set_seed(seed)
    config = MoleBlendConfig(
        **pretrained.config.to_diff_dict()
        | {"num_labels": 1, "problem_type": "regression", "id2label": {0: "logP"}, "label2id": {"logP": 0}}
        | {"target_means": [labels.mean().item()], "target_scales": [labels.std().item()]}
    )
    model = MoleBlendForSequenceClassification(config)
    model.moleblend.load_state_dict(pretrained.moleblend.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(80):
        chosen = torch.randperm(len(graphs))[:32].tolist()
        loss = model(**processor.pad([graphs[index] for index in chosen]), labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"seed {seed}: loss {loss.item():.3f}, in units of the spread of the labels")
    return model.eval()


ensemble = MoleBlendEnsembleForSequenceClassification.from_members([fine_tuned(seed) for seed in (0, 1)])

# %% A folder with everything: weights, settings, code, and the proof of loading
folder = Path(tempfile.mkdtemp()) / "logp"
ensemble.save_pretrained(folder)
processor.save_pretrained(folder)
write_reference_outputs(ensemble, processor, folder)
print(verify(folder))

# %% Whoever has that folder predicts with it; with `trust_remote_code=True`, also without this package
predict = pipeline("molecular-property-prediction", model=str(folder), device="cpu")
for smiles, answer in zip(HELD_OUT, predict(HELD_OUT), strict=True):
    found, truth = answer["predictions"]["logP"], Crippen.MolLogP(Chem.MolFromSmiles(smiles))
    print(f"{smiles:22} {found['value']:5.2f} ± {found['ensemble_spread']:.2f}   (RDKit: {truth:.2f})")
