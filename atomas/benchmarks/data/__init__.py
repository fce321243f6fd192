"""The data stream beside other libraries: pairs per second of a core, over the same samples."""
