"""Make training triples (text, prompt, answer) in the format of PwC from any text (`icae-fast make-pwc`).

Source: the Prompt-with-Context data of Ge et al., arXiv 2307.06945, section 3.1 and appendix C.
"""

from icae_fast.training.pwc.make import Report, Settings, make_pwc
from icae_fast.training.pwc.records import RecordFile

__all__ = ["RecordFile", "Report", "Settings", "make_pwc"]
