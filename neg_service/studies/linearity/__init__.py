"""How linear neurons are, and how well estimators meet the NEG that interventions measure."""
