"""One file of tests per room; the acceptance vectors of the loop are in test_azr.py beside azr.py."""
