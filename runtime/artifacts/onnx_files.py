"""Names of the decoder's files in a bundle for ONNX Runtime: the graph, and the weights beside it."""

DECODER, DECODER_DATA = "decoder.onnx", "decoder.onnx.data"
