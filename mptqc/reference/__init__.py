"""The numpy meaning of every quantizer and op that mptqc defines."""
