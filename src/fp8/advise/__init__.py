"""Before a training: does it gain from FP8? While it runs: where does the time go?

import fp8.advise
print(fp8.advise.plan("llama-3-8b", tokens=16384).verdict)
print(fp8.advise.profile(step))
"""

from __future__ import annotations

from .plan import Plan, Request, plan
from .profile import Profile, profile

__all__ = ["Plan", "Profile", "Request", "plan", "profile"]
