"""SMILES of 32 drugs (9 to 36 heavy atoms, 22.4 on average): a batch that pads to N = 36."""

DRUG_SMILES = [
    "CC(=O)Oc1ccccc1C(=O)O",  # aspirin
    "CC(C)Cc1ccc(cc1)[C@@H](C)C(=O)O",  # ibuprofen
    "Cn1c(=O)c2c(ncn2C)n(C)c1=O",  # caffeine
    "CC(=O)Nc1ccc(O)cc1",  # paracetamol
    "CN1C(=O)CN=C(c2ccccc2)c2cc(Cl)ccc21",  # diazepam
    "CNCCC(Oc1ccc(cc1)C(F)(F)F)c1ccccc1",  # fluoxetine
    "COc1ccc2[nH]c(nc2c1)S(=O)Cc1ncc(C)c(OC)c1C",  # omeprazole
    "CN(C)C(=N)NC(=N)N",  # metformin
    "CC(C)NCC(O)COc1cccc2ccccc12",  # propranolol
    "Clc1ccccc1C1=NCc2nncn2-c2ccc(Cl)cc21",  # a triazolobenzodiazepine
    "CN1CCN(CC1)C1=Nc2cc(Cl)ccc2Nc2ccccc12",  # clozapine
    "O=C(O)c1cn(C2CC2)c2cc(N3CCNCC3)c(F)cc2c1=O",  # ciprofloxacin
    "CCOC(=O)N1CCC(=C2c3ccc(Cl)cc3CCc3cccnc32)CC1",  # loratadine
    "CC(C)(C)NCC(O)c1ccc(O)c(CO)c1",  # salbutamol
    "COc1cc2ncnc(Nc3ccc(F)c(Cl)c3)c2cc1OCCCN1CCOCC1",  # gefitinib
    "C#Cc1cccc(Nc2ncnc3cc(OCCOC)c(OCCOC)cc23)c1",  # erlotinib
    "O=C1CCC(N2C(=O)c3ccccc3C2=O)C(=O)N1",  # thalidomide
    "Cc1ccc(cc1)-c1cc(nn1-c1ccc(cc1)S(N)(=O)=O)C(F)(F)F",  # celecoxib
    "CC12CCC3C(CCC4=CC(=O)CCC34C)C1CCC2O",  # testosterone
    "OC(=O)COCCN1CCN(CC1)C(c1ccccc1)c1ccc(Cl)cc1",  # cetirizine
    "CN1C2CCC1CC(C2)OC(=O)C(CO)c1ccccc1",  # atropine
    "CCN(CC)CC(=O)Nc1c(C)cccc1C",  # lidocaine
    "CC(=O)N1CCN(CC1)c1ccc(cc1)OCC1COC(O1)(Cn1ccnc1)c1ccc(Cl)cc1Cl",  # ketoconazole
    "Nc1ccc(cc1)S(=O)(=O)Nc1ncccn1",  # sulfadiazine
    "CC1(C)SC2C(NC(=O)Cc3ccccc3)C(=O)N2C1C(=O)O",  # penicillin G
    "O=C(O)Cc1ccccc1Nc1c(Cl)cccc1Cl",  # diclofenac
    "CN1CCC23C4Oc5c3c(CC1C2C=CC4O)ccc5O",  # morphine
    "CC(CCc1ccccc1)NCC(O)c1ccc(O)c(C(N)=O)c1",  # labetalol
    "COc1ccc(CCN(C)CCCC(C#N)(C(C)C)c2ccc(OC)c(OC)c2)cc1OC",  # verapamil
    "CCOc1ccc(cc1-c1nc2c(C)nn(CCC)c2c(=O)[nH]1)S(=O)(=O)N1CCN(C)CC1",  # an isomer of sildenafil
    "Cc1c(-c2ccc(cc2)-c2ccccc2)nc2ccc(F)cc2c1C(=O)O",  # an analogue of brequinar
    "CC(C)c1nc(N(C)S(C)(=O)=O)nc(-c2ccc(F)cc2)c1C=CC(O)CC(O)CC(=O)O",  # rosuvastatin
]
