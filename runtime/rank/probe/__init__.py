"""The probe: one small step, run in more than one way before any picture is drawn, to be compared."""
