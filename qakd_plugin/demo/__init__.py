"""The whole line on real data, in a few minutes: see :mod:`qakd_plugin.demo.run`."""
