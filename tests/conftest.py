"""Property tests tell the same stories in every run, so that a commit passes or fails by itself.

HYPOTHESIS_PROFILE=explore makes up new ones.
"""

import os

from hypothesis import settings

# No deadline: a time on a busy machine says nothing about the code.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
