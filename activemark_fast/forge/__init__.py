"""Forgeries: how far somebody gets who claims a model that they did not mark.

The suspect stays as it is: a forger who may change it could mark it honestly. Whatever else a verification
uses, they bring along, and they have read this source. Each *way* of forging is a function of the table
`WAYS`; each ends in the public `verify` on a watermark that was sealed with the forger's key, as `embed`
seals one. Whoever finds a further way adds a function.
"""

from activemark_fast.forge.play import WAYS, Forgery, Way, forge
from activemark_fast.forge.thief import Attempt, Thief

__all__ = ["WAYS", "Attempt", "Forgery", "Thief", "Way", "forge"]
