"""What a page of the docs holds."""

import re

# ```python no-run marks a block that needs what a test has not: a cluster, a data set.
BLOCK = re.compile(r"^```python *\n(.*?)^```", re.MULTILINE | re.DOTALL)
