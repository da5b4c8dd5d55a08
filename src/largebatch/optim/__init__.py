"""Large-batch optimizers for any PyTorch program; this package needs torch alone."""

from largebatch.optim.clars import CLARS
from largebatch.optim.lamb import LAMB
from largebatch.optim.lars import LARS
from largebatch.optim.merit import MERIT
from largebatch.optim.muon import AdaMuon, Muon
from largebatch.optim.rotational import RotationalLion
from largebatch.optim.sample_norms import SampleNorms
from largebatch.optim.sample_squares import SampleSquares
from largebatch.optim.tvlars import TVLARS
from largebatch.optim.vrgd import VRLAMB, VRLARS

__all__ = [
    "CLARS", "LAMB", "LARS", "MERIT", "TVLARS", "VRLAMB", "VRLARS", "AdaMuon", "Muon", "RotationalLion", "SampleNorms",
    "SampleSquares",
]  # fmt: skip
