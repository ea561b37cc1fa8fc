"""Recipes: a YAML of steps, each a run, with references between them."""

from lfm.recipe.expand import Job as Job
from lfm.recipe.expand import expand as expand
from lfm.recipe.parse import Recipe as Recipe
from lfm.recipe.parse import parse as parse
from lfm.recipe.parse import read as read
from lfm.recipe.parse import shipped as shipped
