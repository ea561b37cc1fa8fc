"""What a method is. Imports no torch."""

from lfm.core.config import Config as Config
from lfm.core.config import Meta as Meta
from lfm.core.finding import Curve as Curve
from lfm.core.finding import Finding as Finding
from lfm.core.method import Cost as Cost
from lfm.core.method import Data as Data
from lfm.core.method import DataSlot as DataSlot
from lfm.core.method import Inputs as Inputs
from lfm.core.method import Method as Method
from lfm.core.method import Parts as Parts
from lfm.core.method import Run as Run
from lfm.core.method import Sizes as Sizes
from lfm.core.method import Slot as Slot
from lfm.core.model import Codec as Codec
from lfm.core.model import Embeddings as Embeddings
from lfm.core.model import Facts as Facts
from lfm.core.model import Features as Features
from lfm.core.model import Gradients as Gradients
from lfm.core.model import Logits as Logits
from lfm.core.model import Logprobs as Logprobs
from lfm.core.model import LowRank as LowRank
from lfm.core.model import Model as Model
from lfm.core.model import Score as Score
from lfm.core.model import Text as Text
from lfm.core.model import Weights as Weights
