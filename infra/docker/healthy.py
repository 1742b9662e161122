"""The images' health check: whether each address in DARKROOM_HEALTH answers. A container that serves nothing is healthy."""

import os
import sys
import urllib.error
import urllib.request

for url in os.environ.get("DARKROOM_HEALTH", "").split():
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (OSError, urllib.error.HTTPError) as error:
        sys.exit(f"{url}: {error}")
