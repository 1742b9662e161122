"""What lies on disk: columns, shards, manifests, sources. numpy, pyarrow and fsspec; torch only in `loader.py`."""
