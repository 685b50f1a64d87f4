"""Collect the three folders through padst_compiler only: a bare name would import a file twice."""

collect_ignore = ["passes", "kernels", "export"]
