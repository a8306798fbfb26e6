"""The whole pipeline on real data, in a few minutes: see :mod:`qakd_plugin.demo.pipeline`."""
