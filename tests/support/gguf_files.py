"""Files of llama.cpp, written for tests by the library of its authors."""

import gguf
import numpy as np

from research.formats.gguf.metadata_fields import write_metadata
from research.formats.gguf.rope_metadata import rope_tables
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import used

SUPPORTED = {
    int: "uint32",
    float: "float32",
    bool: "bool",
    str: "string",
    list: "array",
}


def write_gguf(file, metadata, tensors):
    """Writes plain arrays and metadata, as they are."""
    writer = gguf.GGUFWriter(file, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            getattr(writer, f"add_{SUPPORTED[type(value)]}")(key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_tensors(model, params):
    """A model's parameters as llama.cpp names and lays them out, and its tables."""
    tensors = dict(rope_tables(model.architecture))
    for stored in used(family_of(model.architecture).gguf_tensors, model.specs):
        for name, index in stored.names(model.specs):
            values = [np.asarray(params[path][index]) for path in stored.paths]
            tensors[name] = stored.pack(values, model.specs)
    return tensors


def write_model(file, model, params, **changes):
    """Writes a whole model, with some of its metadata changed; None removes one."""
    metadata = write_metadata(model.architecture) | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(file, metadata, gguf_tensors(model, params))
