"""Property tests tell the same stories in every run, so that a commit passes or fails by itself.

HYPOTHESIS_PROFILE=explore makes up new ones.
"""

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
