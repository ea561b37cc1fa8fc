"""The only training loop, and the losses."""

from lfm.data.suited import suited as suited
from lfm.train.batches import once as once
from lfm.train.cost import training as training
from lfm.train.fit import Fit as Fit
from lfm.train.fit import fit as fit
from lfm.train.loop import loop as loop
from lfm.train.seeds import seeded as seeded
from lfm.train.state import State as State
from lfm.train.state import fingerprint as fingerprint
from lfm.train.state import state_of as state_of
from lfm.train.taught import LEARNT as LEARNT
from lfm.train.taught import RECORDS as RECORDS
from lfm.train.taught import taught as taught
