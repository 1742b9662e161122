"""What lies in a store, for tests that hold one against another."""

from __future__ import annotations

from data import manifest, storage


def held(root: object, stage: str) -> dict[str, str]:
    """name -> SHA-256 of every file of the one artifact of `stage`; of a snapshot, which knows its time, its digest."""
    home = storage.join(str(root), "store", stage)
    (name,) = storage.list_folders(home)
    folder = storage.join(home, name)
    names = [entry.name for entry in storage.list_tree(folder)]
    found = {
        f"{name}/{file}": storage.sha256(storage.join(folder, file))[1]
        for file in names
        if not file.startswith(("_meta/lease", "_meta/snapshots"))
    }
    return found | {f"{name}/{made.fingerprint}": made.digest for made in manifest.snapshots(folder)}
