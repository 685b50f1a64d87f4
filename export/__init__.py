"""How a compiled model leaves: one file a format."""

from padst_compiler.export.onnx import ExportReport, FoldedModule, write_onnx

__all__ = ["FORMATS", "ExportReport", "FoldedModule"]

FORMATS = {"onnx": write_onnx}
