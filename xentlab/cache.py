"""Compiled programs are kept between runs, by JAX, in the user's cache folder."""

import contextlib
import os
import pathlib
import warnings

from xentlab.names import expanded

OFF, ON = ("0", "off", "no", "false"), ("1", "on", "yes", "true")
JAXS_OWN = ("-cache", "-atime")  # how the names end that JAX gives to programs, and to notes of when they were read
LIMIT = 2 << 30  # bytes; what was used last stays


def folder() -> pathlib.Path | None:
    """Where compiled programs are kept; None where XENTLAB_CACHE=off says that they are not.

    XENTLAB_CACHE may name another folder; without it, or where it only says "on", the user's own cache folder of this system.
    In either they have a folder to themselves, for what is there besides is the user's.
    """
    said = os.environ.get("XENTLAB_CACHE", "")
    if said.lower() in OFF:
        return None
    if said and said.lower() not in ON:
        return expanded(said) / "compiled"
    import platformdirs

    return pathlib.Path(platformdirs.user_cache_dir("xentlab")) / "compiled"


def keep_compiled() -> pathlib.Path | None:
    """Lets JAX keep what it compiles; where, or None if it does not. JAX's own JAX_COMPILATION_CACHE_DIR goes first."""
    import jax

    if jax.config.jax_compilation_cache_dir or not (place := folder()):
        return None
    try:
        place.mkdir(parents=True, exist_ok=True)
        tidy(place)
    except OSError:  # a home that cannot be written: everything works, and is compiled each time
        return None
    # What another process is just writing, or did not live to, is compiled again; so is what finds no room here.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(place))
    # JAX would skip what compiles in less than a second, which is nearly all of a small program.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return place


def tidy(place: pathlib.Path, limit: int = LIMIT) -> None:
    """Deletes JAX's files that were used longest ago until the rest fit into `limit` bytes, and any that is empty.

    Once a process, when it starts: JAX's own limit has each program that is kept look at all files, under a lock, which takes
    longer than compiling it once there are a few hundred.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     _ = [(pathlib.Path(name) / each).write_bytes(b"123") for each in ("a-cache", "b-cache", "mine.txt")]
    ...     tidy(pathlib.Path(name), limit=3)
    ...     "mine.txt" in os.listdir(name), len(os.listdir(name))
    (True, 2)
    """
    found = []
    for each in os.scandir(place):
        if not each.name.endswith(JAXS_OWN):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process was first
            kept = each.stat()
            found.append((max(kept.st_atime, kept.st_mtime), kept.st_size, each.path))
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if not size or left > limit:
            pathlib.Path(path).unlink(missing_ok=True)
            left -= size
