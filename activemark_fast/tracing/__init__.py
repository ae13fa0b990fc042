"""Copies for recipients, and whose copy a suspect was made from.

A mark can have further rows, the *traced* ones, each of which answers more or less than it does by itself,
as one bit of a recipient's *codeword* says. What that takes of each weight matrix is solved once; a copy is
then a sum of sign flips. It is kept in the *register*, one file that only the key opens.
"""

from activemark_fast.tracing.codewords import draw_biases, example_codeword
from activemark_fast.tracing.register import Change, Register, RegisterError, changed, check_names
from activemark_fast.tracing.trace import Trace, promise, trace_answers
from activemark_fast.tracing.tree import ProofError, RecipientProof, recipients_root

__all__ = [
    "Change",
    "ProofError",
    "RecipientProof",
    "Register",
    "RegisterError",
    "Trace",
    "changed",
    "check_names",
    "draw_biases",
    "example_codeword",
    "promise",
    "recipients_root",
    "trace_answers",
]
