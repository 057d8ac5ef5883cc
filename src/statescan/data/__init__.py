"""Text in: readers, tokenizers, memory-mapped token files, and the order in which training reads them."""

from statescan.data.audio import dequantize, quantize, read_audio, resample, write_audio
from statescan.data.augment import VaryWaveforms
from statescan.data.dna import Genome, GenomeSampler, Region, read_bed, reverse_complement, split_regions
from statescan.data.listops import LISTOPS_VOCABULARY, ListOpsExample, listops, solve_listops
from statescan.data.recordings import Recordings, load_recordings, read_recordings
from statescan.data.sampler import (
    LaneSampler,
    MixedLengthSampler,
    PackedSampler,
    PackedWindows,
    WindowSampler,
    permute,
)
from statescan.data.synthetic import AssociativeRecall, InductionHeads, SelectiveCopying, SyntheticBatch, SyntheticTask
from statescan.data.text import Chunk, Document, Source, find_sources, packaged_corpus, read_chunks, read_texts
from statescan.data.tokenizer import (
    ByteTokenizer,
    DnaTokenizer,
    JsonTokenizer,
    SymbolTokenizer,
    Tokenizer,
    load_tokenizer,
    token_dtype,
)
from statescan.data.tokens import TokenFile, build_token_file
from statescan.files import default_cache_folder

__all__ = [
    "LISTOPS_VOCABULARY",
    "AssociativeRecall",
    "ByteTokenizer",
    "Chunk",
    "DnaTokenizer",
    "Document",
    "Genome",
    "GenomeSampler",
    "InductionHeads",
    "JsonTokenizer",
    "LaneSampler",
    "ListOpsExample",
    "MixedLengthSampler",
    "PackedSampler",
    "PackedWindows",
    "Recordings",
    "Region",
    "SelectiveCopying",
    "Source",
    "SymbolTokenizer",
    "SyntheticBatch",
    "SyntheticTask",
    "TokenFile",
    "Tokenizer",
    "VaryWaveforms",
    "WindowSampler",
    "build_token_file",
    "default_cache_folder",
    "dequantize",
    "find_sources",
    "listops",
    "load_recordings",
    "load_tokenizer",
    "packaged_corpus",
    "permute",
    "quantize",
    "read_audio",
    "read_bed",
    "read_chunks",
    "read_recordings",
    "read_texts",
    "resample",
    "reverse_complement",
    "solve_listops",
    "split_regions",
    "token_dtype",
    "write_audio",
]
