"""The demo as a Space: MODEL and NEIGHBOURS are variables in the Space's settings."""

import os

from moleblend_hf.checkpoints import open_checkpoint
from moleblend_hf.demo import build_demo, launch_demo
from moleblend_hf.molecule_files import read_molecules
from moleblend_hf.molecule_page import MoleculePage

model = os.environ["MODEL"]  # "user/name", or a folder in the Space
file = os.environ.get("NEIGHBOURS")  # a file in the Space, of molecules to compare with
demo = build_demo(MoleculePage(open_checkpoint(model), model, read_molecules(file) if file else None))

if __name__ == "__main__":
    launch_demo(demo)
