"""Files as accidents and strangers make them: seeded mutations of JSON, of arrays and of bytes."""

import copy
import json
import zipfile

import numpy as np

# In place of a value of JSON: other types, sizes and depths.
ODD_VALUES = (
    None, True, False, 0, -1, 1, 2, 3 * 10**7, 2**31, 2**63, -(2**63), 10**30, 1e-320, 0.5, 1e308, float("nan"),
    float("inf"), "", "x",
    "é" * 300, "../..", [], [0], [[]], {}, {"": None}, [1.0, 0.0], [1, 0.5, 0], {"x": {"y": [1]}},
)  # fmt: skip
ODD_TEXTS = (
    "",
    "{",
    "null",
    "[" * 100_000,
    '{"a":' * 100_000,
    "9" * 5_000,
    "-1e999",
    "\ufeff{}",
    "{}{}",
    '"' + "x" * 10**6,
)
DTYPES = ("float16", "float32", "float64", ">f8", "longdouble", "complex64", "int8", "int64", "bool", "S3", "U2")


def value(random, document):
    """A copy of a JSON document with one to three of its values replaced, removed, or added to."""
    document = copy.deepcopy(document)
    for _ in range(random.integers(1, 4)):
        places = list(_places(document))
        if not places:
            return ODD_VALUES[random.integers(len(ODD_VALUES))]
        container, key = places[random.integers(len(places))]
        kind = random.integers(4)
        odd = copy.deepcopy(ODD_VALUES[random.integers(len(ODD_VALUES))])
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[str(odd)] = odd
        else:
            container[key] = odd
    return document


def _places(document):
    if isinstance(document, dict | list):
        for key, item in document.items() if isinstance(document, dict) else enumerate(document):
            yield document, key
            yield from _places(item)


def text(random, document):
    """The text of a damaged JSON document."""
    kind = random.integers(10)
    if kind == 0:
        return ODD_TEXTS[random.integers(len(ODD_TEXTS))].encode()
    if kind == 1:
        return content(random, json.dumps(document).encode())
    return json.dumps(value(random, document)).encode()


def content(random, whole):
    """Bytes of a file, cut off, with some of them changed, or with others put in."""
    kind, at = random.integers(3), random.integers(len(whole))
    if kind == 0:
        return whole[:at]
    if kind == 1:
        return whole[:at] + random.bytes(random.integers(1, 100)) + whole[at:]
    changed = bytearray(whole)
    for place in random.integers(len(whole), size=random.integers(1, 9)):
        changed[place] ^= 1 << random.integers(8)
    return bytes(changed)


def arrays(random, whole):
    """Arrays of which one has another dtype, shape or value, or is missing."""
    damaged = dict(whole)
    name = list(whole)[random.integers(len(whole))]
    array, kind = whole[name], random.integers(6)
    with np.errstate(all="ignore"):
        if kind == 0:
            del damaged[name]
        elif kind == 1 and array.dtype.kind == "f":
            damaged[name] = array.astype(DTYPES[random.integers(len(DTYPES))])
        elif kind == 2:
            damaged[name] = array[..., None] if random.integers(2) else array.reshape(-1)
        elif kind == 3 and array.ndim:
            damaged[name] = array[: random.integers(len(array))]
        elif kind == 4 and array.dtype.kind == "f" and array.size:
            damaged[name] = array.copy()
            damaged[name].flat[random.integers(array.size)] = random.choice([np.nan, np.inf, -1e30, 1e30, 0])
        else:
            damaged[name] = np.array(random.choice(["", "x", "{}", "[1]"]))
    return damaged


def write_bomb(path, name, dtype="<f8", count=2**26):
    """An .npz file of half a megabyte whose one array has half a gigabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": (count,)})
        block = bytes(2**24)
        for _ in range(count * np.dtype(dtype).itemsize // len(block)):
            stream.write(block)
