"""What goes wrong around calibration and export: killed runs, full disks, damaged files, and more.

`kills.py` kills real runs at chosen places, `tripwire.py` is how; the tests of the folder are one
file a kind of fault.
"""
