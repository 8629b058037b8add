"""Formats that a variant can be exported to, one file each: how it is written, and who reads it back.

    options.py     the names with a line each, and the packages they need; imports nothing heavy
    source.py      the folder that is exported, tensor by tensor
    FORMAT.py      write(source, folder) -> Written, and read(folder, ids, source) -> (reader, logits)
    table.py       FORMATS, name -> the two functions
    check.py       is what a foreign reader computes what the variant computes?
"""
