"""Gradient-free search."""

from lfm.search.box import Axis as Axis
from lfm.search.box import Box as Box
from lfm.search.box import box as box
from lfm.search.cma import Generation as Generation
from lfm.search.cma import generations as generations
from lfm.search.searchers import Kind as Kind
from lfm.search.searchers import Searcher as Searcher
from lfm.search.searchers import searcher as searcher
from lfm.search.trial import Trial as Trial
